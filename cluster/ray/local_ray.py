"""Starts a Ray for this driver alone, out of reach of the terminal's signals, and ends all of its processes."""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from cluster.config import ClusterConfig
from cluster.machine.deferred_signals import stop_signals_deferred
from cluster.machine.search_path import job_config
from cluster.ray.ray_folder import check_folder, end_processes_of, own_folder
from cluster.ray.ray_watch import ESSENTIAL, RayWatch
from dispatch.errors import UserError

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Ray refuses less than 75 MiB. Tokens and weights never travel through the object store, so nothing needs more.
OBJECT_STORE_BYTES = 80 * 2**20
# Workers have the priority that they have under torchrun; with Ray's niceness of 15 they wait for all else.
WORKER_PRIORITY = {"RAY_worker_niceness": "0"}
LOG_LINES = 15
COMPLAINT = re.compile(r"\[[-\d]+ [\d:,]+ [WECF] ")  # [date time,ms severity pid thread], warnings and worse


class RayNotStarted(UserError, RuntimeError):
    """No Ray came up on this machine; the message ends with its log."""


@contextmanager
def local_ray(config: ClusterConfig) -> Iterator[None]:
    """Start a Ray for this process and connect to it. It ends with the `with` block, or with this process.

    Raises:
        RayNotStarted: it failed to start, or took longer than `start_timeout_s`.
        InvalidValue: RAY_TMPDIR names no folder, or one whose path is too long.
    """
    check_folder()
    import ray
    from ray._private import ray_constants

    # Ray's only switch for sockets on loopback alone. Ray reads the variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER when it
    # is first imported, and this process may have imported it before.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # The token stays in the environment as long as this Ray runs. `cluster.ray.probe.reload_authentication` makes Ray's
    # client read it again, and the client aborts the process if it finds none.
    with own_folder() as folder, _environment(_token_variables()):
        try:
            with stop_signals_deferred(), _environment(_start_variables(config)), _patched_ray(config.start_timeout_s):
                _start(config, folder)
            address = ray.util.get_node_ip_address()
            if not ip_address(address).is_loopback:
                _log.warning(
                    "the local Ray listens on %s, not on loopback: others on this network may reach it", address
                )
            watch = RayWatch.of_this_process()
            try:
                yield
            finally:
                if watch.reason is not None:
                    # Ray has died. Its shutdown would wait for answers of what is left of it.
                    end_processes_of(folder)
        finally:
            ray.shutdown()


def _start(config: ClusterConfig, folder: Path) -> None:
    import ray

    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            num_cpus=config.num_workers,  # Ray also starts as many processes before the first actor asks for one.
            num_gpus=0 if config.device == "cpu" else None,
            object_store_memory=OBJECT_STORE_BYTES,
            job_config=job_config(),
            _temp_dir=str(folder / "r"),
        )
    except Exception as error:  # Ray raises plain `Exception`, too.
        raise RayNotStarted(
            f"Ray did not start on this machine: {error}\nIf it is only busy, try again with a longer "
            f"--cluster.start_timeout_s ({config.start_timeout_s:g}) or with fewer --workers. {_end_of_logs(folder)}"
        ) from error


def _end_of_logs(folder: Path) -> str:
    """The end of the logs of Ray's processes: all lines of .err files, warnings and errors of .out files."""
    shown = []
    for path in sorted(folder.glob("r/session_2*/logs/*")):  # leaves out session_latest, a link to one of these
        if path.name in ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out"):
            lines = path.read_text(errors="replace").splitlines()
            lines = [line for line in lines if path.suffix == ".err" or COMPLAINT.match(line)]
            shown += [f"  {path.name}: {line}" for line in lines[-LOG_LINES:]]
    return "\n".join(["Its logs end with:", *shown]) if shown else "Its logs hold no complaint."


@contextmanager
def _patched_ray(limit_s: float) -> Iterator[None]:
    """Change three things in Ray that have no setting, while it starts.

    - Ray waits 30 s for its raylet, which is too short on a busy machine. Here it waits `limit_s`.
    - Ray's processes belong to the process group of the terminal. A hang-up would end them before the run has saved, as
      would `timeout` and schedulers, which signal the whole group. Here each gets a session of its own.
    - Ray starts an API server and an agent for the dashboard, which takes seconds. Here it starts neither.
    """
    from ray._private import services, utils

    started: list[subprocess.Popen[bytes]] = []
    popen = services.ConsolePopen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options, start_new_session=True))
        return started[-1]

    with (
        _replaced(services, "get_node", functools.partial(_wait_for_node, services.get_node, started, limit_s)),
        _replaced(services, "ConsolePopen", start),
        _replaced(services, "start_api_server", lambda *_, **__: ("", None)),  # its address and its process
        _replaced(utils, "get_dashboard_dependency_error", lambda: ImportError("no dashboard is wanted")),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _wait_for_node(
    get_node: Callable[[str, str], T],
    started: Sequence[subprocess.Popen[bytes]],
    limit_s: float,
    gcs_address: str,
    node_id: str,
) -> T:
    """Repeat `get_node` until the raylet has registered at the head. Fail early if an essential process has ended."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return get_node(gcs_address, node_id)
        except RuntimeError as error:
            for process in started:
                name = Path(process.args[0]).name  # type: ignore[arg-type,index]
                if name in ESSENTIAL and process.poll() is not None:
                    raise ChildProcessError(f"its {name} ended with exit code {process.returncode}") from error
            if time.monotonic() > deadline:
                raise TimeoutError(f"its raylet has not registered after {limit_s:g} s") from error
        time.sleep(0.1)


def _start_variables(config: ClusterConfig) -> dict[str, str]:
    """Environment variables for the start of a local Ray, without those that the user has set."""
    variables = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default. Unset, Ray warns on machines with GPUs.
        "RAY_gcs_server_port_wait_time_s": f"{config.start_timeout_s:.0f}",
        **WORKER_PRIORITY,
    }
    return {name: value for name, value in variables.items() if name not in os.environ}


def _token_variables() -> dict[str, str]:
    """The token of a local Ray, unless the user has set one."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return {} if given else {"RAY_AUTH_TOKEN": auth_token()}


@functools.cache
def auth_token() -> str:
    """A token for the local Rays of this process. Without one Ray would write its own, world-readable, to ~/.ray.

    The same for all sessions, since Ray's client keeps the first one that it reads.
    """
    return secrets.token_hex(32)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
