"""Starting, joining and leaving Ray, and what Ctrl-C may touch."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.config import ClusterConfig
from cluster.machine.deferred_signals import stop_signals_deferred
from cluster.nodes.node import local_address_to
from cluster.ray.local_ray import auth_token
from cluster.ray.session import (
    ClusterUnreachable,
    RaySession,
    check_answers,
    forwarded_environment,
)
from dispatch.errors import InvalidValue
from tests.ray_fixture import ROOT

SAVE_AFTER_CTRL_C = """
import signal, sys
from cluster.config import ClusterConfig
from cluster.gang.gang import Gang
from cluster.ray.session import RaySession
from tests.cluster.dummy_worker import DummyWorker

config = ClusterConfig(num_workers=2, device="cpu", threads_per_worker=1)
pressed, released = [], []
signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
with RaySession.open(config), Gang.launch(config, DummyWorker) as gang:
    def on_poll():
        print("running", flush=True)
        if pressed and not released:
            released.extend(gang.control(rank, "release") for rank in range(2))
    print(gang.run("save_when_released", sys.argv[1], on_poll=on_poll))
"""

JOIN = """
import sys
from cluster.config import ClusterConfig
from cluster.gang.gang import Gang
from cluster.ray.session import RaySession
from tests.cluster.dummy_worker import DummyWorker

config = ClusterConfig(address=sys.argv[1], num_workers=2, device="cpu", cpus_per_worker=0.5)
with RaySession.open(config) as session, Gang.launch(config, DummyWorker) as gang:
    assert session.owned is False
    print(gang.run("train", 5, {}))
"""

HEAVY_IMPORTS = """
import sys
import cluster.config, cluster.gang.preflight, cluster.ray.session, workers.actor
print([name for name in ("ray", "torch") if name in sys.modules])
import cluster.gang.gang
print([name for name in ("ray", "torch") if name in sys.modules])
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A home and a folder for Ray; not pytest's own, whose path is too long for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="tt-", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        yield Path(folder)


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


@pytest.mark.slow
def test_ctrl_c_reaches_the_driver_alone_so_that_the_gang_can_save_and_nothing_is_left(home):
    command = [sys.executable, "-c", SAVE_AFTER_CTRL_C, str(home)]
    variables = environment(HOME=str(home), RAY_TMPDIR=str(home / "ray"))
    driver = subprocess.Popen(
        command, env=variables, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None and driver.stdout.readline() == "running\n"
    family = psutil.Process(driver.pid).children(recursive=True)
    assert sum("WorkerActor" in " ".join(p.cmdline()) for p in family) == 2
    for process in family:  # Stronger than a terminal, which signals only the driver's process group.
        process.send_signal(signal.SIGINT)
    os.killpg(driver.pid, signal.SIGINT)
    output, errors = driver.communicate(timeout=300)
    assert output.splitlines()[-1] == "['saved', 'saved']"
    assert (driver.returncode, errors) == (0, "")  # Quiet too.
    assert sorted(path.name for path in home.glob("rank*")) == ["rank0", "rank1"]
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert list((home / "ray").iterdir()) == []
    assert not (home / ".ray").exists()  # Ray's world-readable token.


def test_joining_by_address_trains_there_and_leaves_that_ray_running(ray_session):
    address = ray.get_runtime_context().gcs_address
    variables = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=auth_token())
    joined = subprocess.run(
        [sys.executable, "-c", JOIN, address], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert (joined.returncode, joined.stdout) == (0, "[10.0, 10.0]\n"), joined.stderr
    assert ray.get(ray.remote(num_cpus=0)(lambda: "still here").remote(), timeout=300) == "still here"


def test_ctrl_c_while_ray_starts_is_kept_until_it_has_started_and_then_acts():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with stop_signals_deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("end of start")
        reached.append("after")
    assert reached == ["end of start"]
    with pytest.raises(KeyboardInterrupt), stop_signals_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append("end of start after two")
    assert reached == ["end of start"]


def test_a_session_inside_another_shares_its_ray_and_does_not_close_it(ray_session):
    with RaySession.open(ClusterConfig()) as inner:
        assert not inner.owned
    assert ray.is_initialized()


def test_a_local_ray_demands_a_token_and_keeps_its_folder_private(ray_session):
    assert ray_session.owned
    assert os.environ["RAY_AUTH_MODE"] == "token"
    folder = Path(ray._private.worker.global_worker.node.address_info["session_dir"]).parents[1]
    assert folder.name.startswith("trimtab-ray-")
    assert folder.stat().st_mode & 0o077 == 0


def test_an_address_where_nothing_listens_is_refused_within_seconds():
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
        check_answers(f"127.0.0.1:{port}")
    begun = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=f"nothing answers at 127.0.0.1:{port} .*trimtab cluster status"):
        check_answers(f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "address",
    ["ray://10.0.0.1:10001", "head", "10.0.0.1:", ":6379", "10.0.0.1:port", "10.0.0.1:0", "10.0.0.1:65536", "head:²"],
)
@pytest.mark.parametrize("ask", [check_answers, local_address_to])
def test_an_address_of_another_form_is_refused_with_the_right_form(address, ask):
    with pytest.raises(InvalidValue, match='must be HOST:PORT, with a port from 1 to 65535, or "auto"'):
        ask(address)


def test_only_transport_settings_are_forwarded(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    forwarded = forwarded_environment()
    assert forwarded["NCCL_DEBUG"] == "WARN"
    assert not {"SLURM_PROCID", "SOME_TOKEN"} & set(forwarded)


def test_neither_configuration_nor_checks_import_ray_and_the_driver_needs_no_torch():
    output = subprocess.run(
        [sys.executable, "-c", HEAVY_IMPORTS], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert output == "[]\n['ray']\n"


READ_AGAIN = """
from cluster.config import ClusterConfig
from cluster.ray.probe import reload_authentication
from cluster.ray.session import RaySession
with RaySession.open(ClusterConfig(num_workers=1, device="cpu")):
    reload_authentication()  # as a look at another cluster does
print("closed")
"""


@pytest.mark.slow
def test_a_token_that_is_read_again_is_still_there_when_the_session_closes():
    done = subprocess.run(
        [sys.executable, "-c", READ_AGAIN], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr
