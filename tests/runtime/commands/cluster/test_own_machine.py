"""A cluster of this machine alone: listens on loopback, and leaves nothing behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from cluster.machine.node_state import BEFORE_SOCKET, DASHBOARD_SOCKET
from tests.runtime.commands.cluster.launched import Place, free_ports, new_place

pytestmark = pytest.mark.slow

JOINED = """
import sys
from cluster.config import ClusterConfig
from cluster.ray.session import RaySession
try:
    with RaySession.open(ClusterConfig(address=sys.argv[1], allow_without_token=len(sys.argv) > 2)):
        print("in")
except ConnectionError as error:
    print(type(error).__name__, error)
"""
CHOSEN = """
import sys
from cluster.nodes.gpus import count_gpus
from runtime.settings.config_file import parse_train
config = parse_train(["--config", "tiny", "--cluster.address", sys.argv[1]], count_gpus).config
print(config.cluster.num_workers, config.run.dtype)
"""


@pytest.fixture
def place() -> Iterator[Place]:
    place = new_place()
    yield place
    place.clean()


def up(place: Place, *options: str) -> tuple[str, ...]:
    port, dashboard_port = free_ports()
    options = (*options, "--port", str(port), "--dashboard-port", str(dashboard_port), "--num-cpus", "1")
    return ("cluster", "up", *options)


def test_by_default_it_listens_on_loopback_alone_and_takes_no_other_machine(place):
    started = place.run(*up(place, "--num-gpus", "4"))
    assert started.returncode == 0, started.stderr
    ours = place.processes()
    listening = {c.laddr.ip for p in ours for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    [head] = [line.split()[-1] for line in started.stdout.splitlines() if line.startswith("the head runs at")]
    join = place.run("cluster", "join", head, "--bind", "127.0.0.3")
    assert join.returncode == 2
    assert "listens on its own machine alone" in join.stderr and "--bind" in join.stderr
    for address in (head, "auto"):
        assert place.python("-c", JOINED, address).stdout == "in\n"
        assert place.python("-c", CHOSEN, address).stdout == "4 bfloat16\n"
    os.kill(min(ours, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    assert place.run("cluster", "status").returncode == 1  # it crashed: nothing to show, and nothing hangs
    again = place.run(*up(place))
    assert again.returncode == 0, again.stderr
    assert place.run("cluster", "down").returncode == 0
    assert place.processes() == []


def test_in_the_longest_folder_that_is_taken_every_socket_of_ray_fits_to_the_byte(place):
    most = 107 - len(BEFORE_SOCKET) - len(DASHBOARD_SOCKET) - len(f"/tt-{os.getuid()}/127.0.0.1")
    (folder := place.folder / ("x" * (most - len(str(place.folder)) - 1))).mkdir()
    started = place.run(*up(place), RAY_TMPDIR=str(folder))
    assert started.returncode == 0, started.stderr
    try:
        sockets = [path for path in folder.rglob("sockets/*") if path.is_socket()]
        session = sockets[0].parent.parent.name
        digits = 7 - len(session.rpartition("_")[2])  # that the pid of another head may have more
        assert max(len(str(each)) for each in sockets) + digits == 107, sockets
        assert place.run("submit", "--list", RAY_TMPDIR=str(folder)).returncode == 0
    finally:
        place.run("cluster", "down", RAY_TMPDIR=str(folder))
    (longer := folder.with_name(folder.name + "x")).mkdir()
    refused = place.run(*up(place), RAY_TMPDIR=str(longer))
    assert (refused.returncode, "at least 1 bytes shorter" in refused.stderr) == (2, True)


def test_a_cluster_without_token_is_started_and_joined_only_by_those_who_say_so(place):
    started = place.run(*up(place, "--bind", "127.0.0.5", "--without-token"))
    assert started.returncode == 0, started.stderr
    assert "demands NO token" in started.stdout
    [head] = [line.split()[-1] for line in started.stdout.splitlines() if line.startswith("the head runs at")]
    other = new_place()
    other.run("cluster", "token")
    try:
        join = other.run("cluster", "join", head, "--bind", "127.0.0.6")
        assert join.returncode == 1
        assert "demands no token" in join.stderr and "--without-token" in join.stderr
        refused = other.python("-c", JOINED, head).stdout
        assert refused.startswith("OpenCluster") and "--cluster.allow_without_token" in refused
        assert other.processes() == []
    finally:
        other.clean()
    assert place.python("-c", JOINED, head, "allowed").stdout == "in\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_nothing_behind(place, number):
    command = [sys.executable, "-m", "runtime", *up(place)]
    starting = subprocess.Popen(command, env=place.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    nodes = place.folder / f"tt-{os.getuid()}"
    deadline = time.monotonic() + 60
    while not list(nodes.glob("127.0.0.1/r/session_*/logs/gcs_server.out")) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = place.processes()
    assert len(family) > 1
    starting.send_signal(number)
    starting.communicate(timeout=300)
    assert starting.returncode == 128 + number
    # Where a container's first process buries nobody, the dead stay in the list.
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert list(nodes.iterdir()) == []


def test_what_cannot_start_is_refused_or_says_what_ray_says(place):
    wrong = place.run(*up(place), "--", "--no-such-option")
    assert wrong.returncode == 1
    assert "Ray ended while it started" in wrong.stderr and "--no-such-option" in wrong.stderr
    assert place.run("cluster", "up", "--bind", "192.0.2.77").stderr.count("cannot listen at 192.0.2.77:6379") == 1
    for address in ("0.0.0.0", "::1", "localhost"):
        refused = place.run("cluster", "up", "--bind", address)
        assert (refused.returncode, "must be an IPv4 address" in refused.stderr) == (2, True)
    opened = place.run("cluster", "up", "--", "--dashboard-host=0.0.0.0")
    assert (opened.returncode, "use a tunnel" in opened.stderr) == (2, True)
    nobody = place.run("cluster", "join", "127.0.0.99:1")
    assert (nobody.returncode, "nothing answers" in nobody.stderr) == (1, True)
    assert place.processes() == []
