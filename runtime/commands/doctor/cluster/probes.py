"""Starts a probe on every node and collects the answers, each within a time limit. Runs on the driver."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from runtime.commands.doctor.cluster import probe as probe_module
from runtime.commands.doctor.cluster.probe import Probe


@dataclass(frozen=True)
class ProbedNode:
    """A node and the probe on it, an actor. ip: its address; name: the address, made unique."""

    name: str
    ip: str
    probe: Any


def start_probes(token: bytes) -> tuple[list[ProbedNode], dict[str, str]]:
    """Start a probe on every node that is alive, without waiting. Also returns why others have none, by address."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes: list[ProbedNode] = []
    dead: dict[str, str] = {}
    # By value: a node on which Trimtab is missing, or another version, must run the probe too.
    cloudpickle.register_pickle_by_value(probe_module)
    try:
        probe_class = cast("Any", ray.remote)(Probe)
        for number, entry in enumerate(sorted(ray.nodes(), key=lambda entry: str(entry["NodeManagerAddress"]))):
            ip = str(entry["NodeManagerAddress"])
            if not entry["Alive"]:
                dead[ip] = "Ray says that it is dead"
                continue
            name = ip if all(node.name != ip for node in nodes) else f"{ip} ({number})"
            affinity = NodeAffinitySchedulingStrategy(entry["NodeID"], soft=False)
            # num_cpus 0: a node whose cores are all taken is probed too.
            actor = probe_class.options(num_cpus=0, max_restarts=0, scheduling_strategy=affinity).remote(token)
            nodes.append(ProbedNode(name, ip, actor))
    finally:
        cloudpickle.unregister_pickle_by_value(probe_module)
    # One that was started again is listed as dead too, under its old number.
    alive = {node.ip for node in nodes}
    return nodes, {ip: reason for ip, reason in dead.items() if ip not in alive}


def answers_of(asked: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers by name, and why there is none for the others, after limit_s at most."""
    import ray

    if not asked:
        return {}, {}
    calls = list(asked.values())
    done = set(ray.wait(calls, num_returns=len(calls), timeout=limit_s)[0])
    answers, silent = {}, {}
    for name, call in asked.items():
        if call not in done:
            silent[name] = f"no answer within {limit_s:g} s"
            continue
        try:
            answers[name] = ray.get(call)
        except ray.exceptions.RayError as error:
            silent[name] = f"its process died or never ran: {str(error).strip().splitlines()[-1]}"
    return answers, silent


def end_probes(nodes: list[ProbedNode]) -> None:
    """End them: their nodes' cores are for the ranks."""
    import ray

    for node in nodes:
        ray.kill(node.probe)
