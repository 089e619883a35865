"""A script for test_elastic: several Ray nodes on this machine, and a run that loses, regains and leaves some of them.

Each node has room for one worker; the head for none. Prints nothing; the run's directory says what happened.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before Ray is imported: loopback, a token of our own, and a node that is missed after seconds instead of a minute.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_worker_niceness": "0",
    "RAY_health_check_failure_threshold": "3",
}

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 * 2**20


def main(run_dir: Path, arguments: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args=_node(num_cpus=0))
    try:
        nodes = [cluster.add_node(**_node()) for _ in range(2)]
        command = [Path(sys.executable).with_name("trimtab"), "train", f"--cluster.address={cluster.address}"]
        run = subprocess.Popen([*command, *arguments])
        try:
            _live_through(cluster, nodes, run_dir, run)
            return 0 if run.wait(120) == 130 else 1  # stopped by Ctrl-C, in order
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGINT)
                time.sleep(1.0)
                run.kill()
                run.wait(30)
    finally:
        cluster.shutdown()


def _live_through(cluster: Cluster, nodes: list, run_dir: Path, run: subprocess.Popen) -> None:
    def wait_for(event: str, number: int) -> None:
        _wait(lambda: len([line for line in _lines(run_dir / "events.jsonl") if line["event"] == event]) >= number, run)

    def wait_for_steps(count: int) -> None:
        before = len(_lines(run_dir / "metrics.jsonl"))
        _wait(lambda: len(_lines(run_dir / "metrics.jsonl")) >= before + count, run)

    wait_for("memory_checkpoints", 1)
    wait_for_steps(5)
    cluster.remove_node(nodes.pop(), allow_graceful=False)  # kills its processes
    wait_for("recovered", 1)  # with one worker
    wait_for_steps(3)
    nodes.append(cluster.add_node(**_node()))
    wait_for("recovered", 2)  # with two again
    wait_for_steps(3)
    cluster.add_node(**_node())  # a spare
    _drain(cluster, nodes[0].node_id)
    wait_for("recovered", 3)  # with two, one of them on the spare
    wait_for_steps(3)
    run.send_signal(signal.SIGINT)


def _node(num_cpus: int = 1) -> dict:
    return {"num_cpus": num_cpus, "num_gpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}


def _drain(cluster: Cluster, node_id: str) -> None:
    """What a cloud's notice of a preemption does: Ray is to leave the node by then."""
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address, "--node-id", node_id]
    options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds"]
    subprocess.run([*command, *options, "60"], check=True, capture_output=True)


def _lines(path: Path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _wait(condition: Callable[[], bool], run: subprocess.Popen, limit_s: float = 240.0) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        if run.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"did not happen; exit code {run.poll()}")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
