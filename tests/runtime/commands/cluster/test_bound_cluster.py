"""A cluster of two nodes beyond loopback, from `up` to `down`: who has its token uses it, and nobody else.

head 127.0.0.2, 1 CPU    node 127.0.0.3, 1 CPU    each a Ray node with processes, ports and folder of its own
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.runtime.commands.cluster.launched import Place, free_ports, new_place

# Ray starts in 7 s a node on an idle machine, in 40 on a busy one.
pytestmark = pytest.mark.slow
needs_jobs = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp") is None, reason="needs ray[default]: pip install 'trimtab[cluster]'"
)

# A gang that waits in a collective-like call, one rank a node, so that the status has something to show.
GANG = """
import sys, time
from cluster.config import ClusterConfig
from cluster.gang.gang import Gang
from cluster.ray.session import RaySession
from tests.cluster.dummy_worker import DummyWorker

config = ClusterConfig(address=sys.argv[1], num_workers=2, device="cpu", start_timeout_s=60)
with RaySession.open(config) as session, Gang.launch(config, DummyWorker) as gang:
    print(sorted(place.ip for place in gang.rank_map), flush=True)
    sys.stdin.readline()
    print(gang.run("train", 5, {}))
"""

DRIVER = """
import sys, time
from cluster.config import ClusterConfig
from cluster.ray.session import RaySession
begun = time.monotonic()
try:
    with RaySession.open(ClusterConfig(address=sys.argv[1])):
        print("in")
except ConnectionError as error:
    print(type(error).__name__, str(error).splitlines()[0])
print(time.monotonic() - begun < 15)
"""

# Ray's own protocol, without Ray's client: the control store, a node's manager, and a worker, which runs actors.
CALLS = """
import sys, grpc
from ray.core.generated import core_worker_pb2, core_worker_pb2_grpc, gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

head, manager, worker, method, *token = sys.argv[1:]
metadata = [("authorization", "Bearer " + token[0])] if token else []
calls = (
    (head, gcs_service_pb2_grpc.NodeInfoGcsServiceStub, "CheckAlive", gcs_service_pb2.CheckAliveRequest()),
    (manager, node_manager_pb2_grpc.NodeManagerServiceStub, "GetNodeStats", node_manager_pb2.GetNodeStatsRequest()),
    (worker, core_worker_pb2_grpc.CoreWorkerServiceStub, method, getattr(core_worker_pb2, method + "Request")()),
)
for address, stub, method, request in calls:
    try:
        getattr(stub(grpc.insecure_channel(address)), method)(request, timeout=10, metadata=metadata)
        print(method, "OK")
    except grpc.RpcError as error:
        print(method, error.code().name)
"""

WHERE = """
import json, sys
from pathlib import Path
from cluster.ray.access import find_access
from cluster.ray.probe import authenticated
from cluster.nodes.status import _global_state

access = find_access("auto")
with _global_state(access) as state:
    [node] = [row for row in state.node_table() if row["NodeManagerAddress"] == "127.0.0.3"]
    actors = [row["Address"] for row in state.actor_table(None, None, None).values() if row["State"] == "ALIVE"]
print(f"127.0.0.3:{node['NodeManagerPort']}", *(f"{row['IPAddress']}:{row['Port']}" for row in actors[:1]))
"""

# Stands for a tree of Trimtab of another version: what the job runs must be this, not the installed one.
UPLOADED = """
import pathlib, sys
import ray
import workers

@ray.remote(num_cpus=0.1)
def version_in_an_actor():
    import workers
    return workers.VERSION

if sys.argv[1] == "sleep":
    print("asleep", flush=True)
    import time
    time.sleep(600)
ray.init("auto", log_to_driver=False)
print("driver", workers.VERSION, "actor", ray.get(version_in_an_actor.remote()), "arguments", sys.argv[1:], flush=True)
print("left out", sorted(name for name in (".git", "runs", "data", ".venv") if pathlib.Path(name).exists()))
sys.exit(7 if sys.argv[1] == "fail" else 0)
"""


@dataclass(frozen=True)
class Cluster:
    place: Place
    head: str
    dashboard: str
    up: str
    join: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    place = new_place()
    port, dashboard_port = free_ports()
    try:
        ports = ("--port", str(port), "--dashboard-port", str(dashboard_port))
        up = place.run("cluster", "up", "--bind", "127.0.0.2", *ports, "--num-cpus", "1")
        assert up.returncode == 0, up.stderr
        head = f"127.0.0.2:{port}"
        join = place.run("cluster", "join", head, "--bind", "127.0.0.3", "--num-cpus", "1", "--", "--labels", "zone=a")
        assert join.returncode == 0, join.stderr
        yield Cluster(place, head, f"http://127.0.0.1:{dashboard_port}", up.stdout, join.stdout)
    finally:
        place.clean()


@pytest.fixture(scope="module")
def stranger() -> Iterator[Place]:
    """Another user: no node, no token."""
    place = new_place()
    yield place
    place.clean()


def test_up_tells_what_the_others_need(cluster):
    token = cluster.place.token
    assert f"token: {token}" in cluster.up
    assert f"trimtab cluster join {cluster.head}" in cluster.up
    assert "127.0.0.3 is a node of the cluster" in cluster.join
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o077 == 0


def test_up_twice_says_that_it_runs_and_another_head_beside_it_is_refused(cluster):
    again = cluster.place.run("cluster", "up", "--bind", "127.0.0.2")
    assert (again.returncode, again.stderr) == (0, "")
    assert "runs already, as the head of a cluster, at 127.0.0.2" in again.stdout
    other = cluster.place.run("cluster", "up", "--bind", "127.0.0.9")
    assert other.returncode == 2
    assert "trimtab cluster down" in other.stderr


def test_status_shows_who_runs_what_and_a_driver_of_the_head_needs_no_variables(cluster, stranger):
    driver = subprocess.Popen(
        [sys.executable, "-c", GANG, cluster.head],
        env=cluster.place.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "['127.0.0.2', '127.0.0.3']\n"
        status = cluster.place.run("cluster", "status")
        assert status.returncode == 0, status.stderr
        rows = {line.split()[0]: line.split() for line in status.stdout.splitlines() if line.startswith("127.")}
        assert rows["127.0.0.2"][2:4] == ["head", "1/1"]
        assert rows["127.0.0.3"][2:4] == ["alive", "1/1"]
        assert "zone=a" in rows["127.0.0.3"]
        assert "2 nodes alive" in status.stdout
        assert "  127.0.0.3: WorkerActor" in status.stdout or "expert-worker" in status.stdout
        calls = ("-c", CALLS, cluster.head, *cluster.place.python("-c", WHERE).stdout.split())
        refused = "CheckAlive UNAUTHENTICATED\nGetNodeStats UNAUTHENTICATED\nKillActor UNAUTHENTICATED\n"
        assert stranger.python(*calls, "KillActor").stdout == refused
        assert stranger.python(*calls, "KillActor", "0" * 64).stdout == refused
        admitted = stranger.python(*calls, "NumPendingTasks", cluster.place.token.read_text()).stdout
        assert admitted == "CheckAlive OK\nGetNodeStats OK\nNumPendingTasks OK\n"
    finally:
        output, _ = driver.communicate("go on\n", timeout=300)
    assert output == "[10.0, 10.0]\n"


def test_a_driver_without_the_token_or_with_another_is_refused_fast_and_told_what_to_do(cluster, stranger):
    for variables in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}):
        tried = stranger.python("-c", DRIVER, cluster.head, **variables)
        message, fast = tried.stdout.splitlines()
        assert message.startswith(f"TokenRefused the cluster at {cluster.head} demands its token"), tried
        assert "RAY_AUTH_TOKEN_PATH" in message
        assert fast == "True"
    told = stranger.run("cluster", "status", "--address", cluster.head)
    assert told.returncode == 1
    assert "demands its token" in told.stderr


def test_a_machine_without_the_token_or_with_another_cannot_join(cluster, stranger):
    join = ("cluster", "join", cluster.head, "--bind", "127.0.0.4")
    without = stranger.run(*join)
    assert without.returncode == 2
    assert "cannot be read" in without.stderr and "--token-file" in without.stderr
    other = stranger.folder / "other-token"
    assert stranger.run("cluster", "token", str(other)).stdout == f"{other}\n"
    assert "demands its token" in stranger.run(*join, "--token-file", str(other)).stderr
    asked_not_to = stranger.run(*join, "--without-token")
    assert asked_not_to.returncode == 1 and "demands its token" in asked_not_to.stderr
    assert stranger.processes() == []


@needs_jobs
@pytest.mark.parametrize("path", ["api/jobs/", "api/version", "nodes?view=summary", "api/v0/actors", "logical/actors"])
def test_the_dashboard_answers_nobody_without_the_token(cluster, path):
    def status_of(headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"{cluster.dashboard}/{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as refusal:
            return refusal.code

    assert status_of({}) == 401
    assert status_of({"Authorization": f"Bearer {'0' * 64}"}) in (401, 403)
    assert status_of({"Authorization": f"Bearer {cluster.place.token.read_text()}"}) == 200


@needs_jobs
def test_no_job_is_taken_without_the_token(cluster, stranger, tree):
    ran = stranger.folder / "ran"
    body = json.dumps({"entrypoint": f"touch {ran}"}).encode()
    request = urllib.request.Request(
        f"{cluster.dashboard}/api/jobs/", body, {"Content-Type": "application/json"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=20)
    assert refusal.value.code == 401
    given = ("--working-dir", str(tree), "--address", cluster.dashboard)
    submitted = stranger.run("submit", *given, "--", "ok")
    assert submitted.returncode == 1
    assert "demands the cluster's token" in submitted.stderr
    assert submitted.stderr.count("\n") == 1
    assert "no jobs" not in cluster.place.run("submit", "--list").stdout
    assert not ran.exists()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for package, text in (("runtime", ""), ("workers", "VERSION = 'uploaded'")):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(text)
    (folder / "runtime" / "__main__.py").write_text(UPLOADED)
    for name in (".git", "runs", "data", ".venv"):
        (folder / name).mkdir()
        (folder / name / "large").write_bytes(bytes(2_000_000))
    return folder


@needs_jobs
def test_a_job_runs_the_uploaded_code_and_gives_its_output_and_exit_code(cluster, tree):
    done = cluster.place.run("submit", "--working-dir", str(tree), "--", "fail", "a b;c")
    assert done.returncode == 7, done
    assert "driver uploaded actor uploaded arguments ['fail', 'a b;c']" in done.stdout
    assert "left out []" in done.stdout
    assert "uploading 0.0 MB" in done.stdout
    assert str(cluster.place.token.read_text()) not in done.stdout + done.stderr


@needs_jobs
def test_ctrl_c_leaves_the_job_and_says_how_to_end_it(cluster, tree):
    command = [sys.executable, "-m", "runtime", "submit", "--working-dir", str(tree), "--", "sleep"]
    submitting = subprocess.Popen(
        command, env=cluster.place.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert submitting.stdout is not None
    for line in submitting.stdout:
        if line == "asleep\n":
            break
    submitting.send_signal(signal.SIGINT)
    output, errors = submitting.communicate(timeout=300)
    assert (submitting.returncode, errors) == (130, "")
    job = output.split("trimtab submit --stop ")[1].split()[0]
    assert f"{job}  RUNNING" in cluster.place.run("submit", "--list").stdout
    assert cluster.place.run("submit", "--stop", job).returncode == 0
    followed = cluster.place.run("submit", "--logs", job)
    assert followed.returncode == 1
    assert f"{job} STOPPED" in followed.stderr


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    started = subprocess.Popen(["sleep", "600"])
    yield psutil.Process(started.pid)
    started.kill()
    started.wait()


def test_down_ends_one_node_or_all_and_nothing_else(cluster, bystander):
    """Last: it ends the cluster. A node that crashed is cleaned up like one that runs."""
    leader = json.loads((nodes(cluster.place) / "127.0.0.3" / "node.json").read_text())["leader"]["pid"]
    os.kill(leader, signal.SIGKILL)
    ended = cluster.place.run("cluster", "down", "127.0.0.3")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (nodes(cluster.place) / "127.0.0.3").exists()
    assert [p for p in cluster.place.processes() if "127.0.0.3" in " ".join(p.cmdline())] == []
    assert wait_for(lambda: "1 node alive, 1 gone" in cluster.place.run("cluster", "status").stdout)
    ended = cluster.place.run("cluster", "down")
    assert (ended.returncode, ended.stdout.split(" at ")[0]) == (0, "ended the head")
    assert cluster.place.processes() == []
    assert list(nodes(cluster.place).iterdir()) == []
    assert bystander.status() == psutil.STATUS_SLEEPING
    assert "nothing of `trimtab cluster` runs" in cluster.place.run("cluster", "down").stdout
    gone = cluster.place.run("cluster", "status")
    assert (gone.returncode, "no cluster" in gone.stdout) == (1, True)


def nodes(place: Place) -> Path:
    return place.folder / f"tt-{os.getuid()}"


def wait_for(condition, limit_s: float = 30) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
    return True
