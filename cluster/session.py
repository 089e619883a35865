"""Start a Ray of our own on this machine, or join one by address; leave it as it was found."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

from cluster.access import check_access, find_access
from cluster.config import ClusterConfig
from cluster.node_state import ray_folder
from cluster.probe import ClusterUnreachable, authenticated, check_answers
from workers.actor import TRANSPORT_PREFIXES

_log = logging.getLogger(__name__)

# Ray refuses less than 75 MiB. Tokens and weights never travel through the object store, so nothing needs more.
OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """A connection to Ray.

    `owned` is true when closing it ends the Ray processes; `open_s` is how long opening took.
    """

    owned: bool
    open_s: float

    @classmethod
    @contextmanager
    def open(cls, config: ClusterConfig) -> Iterator[RaySession]:
        """Yield a session on a new local Ray, on the one at `config.address`, or on the one this process already uses.

        Raises:
            ClusterUnreachable: nothing usable answers at `config.address`.

        Open it on a thread that outlives the session: the kernel ends a local Ray with the thread that started it.
        Ctrl-C is safe at any time: Ray masks SIGINT for all its processes, so only the driver sees it.
        """
        import ray  # Half a second: only for those who open a session.

        begun = time.monotonic()
        if ray.is_initialized():
            yield cls(owned=False, open_s=0.0)
            return
        with _local_ray(config) if config.address is None else _joined_ray(config):
            yield cls(owned=config.address is None, open_s=time.monotonic() - begun)


@contextmanager
def _local_ray(config: ClusterConfig) -> Iterator[None]:
    import ray
    from ray._private import ray_constants

    # Ray's one switch for loopback-only sockets. It is read when ray is first imported, which may lie behind us.
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Short, since the paths of the Unix sockets below it may have 107 characters. Private (0700): Ray opens its own
    # folder to everybody, so it gets one inside.
    folder = Path(tempfile.mkdtemp(prefix="trimtab-ray-", dir=ray_folder()))
    # The token stays as long as this Ray: its client aborts the process where it reads the token again, as
    # `cluster.probe.read_again` makes it, and finds none.
    with _environment(_token_variables()):
        try:
            with ctrl_c_deferred(), _environment(_local_variables()):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    num_cpus=config.num_workers,  # Also the number of processes that Ray starts ahead of the actors.
                    num_gpus=0 if config.device == "cpu" else None,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(folder / "r"),
                )
            address = ray.util.get_node_ip_address()
            if not ip_address(address).is_loopback:
                _log.warning(
                    "the local Ray listens on %s, not on loopback: others on this network may reach it", address
                )
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _local_variables() -> dict[str, str]:
    """Environment under which a local Ray is started; what the user has set wins."""
    variables = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Its future default; unset, Ray prints a warning on GPU machines.
    }
    return {name: value for name, value in variables.items() if name not in os.environ}


def _token_variables() -> dict[str, str]:
    """The token of a local Ray, where the user has set none."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return {} if given else {"RAY_AUTH_TOKEN": _auth_token()}


@functools.cache
def _auth_token() -> str:
    """A token for this process's own Rays, so that none is written, world-readable, into the user's home.

    One for all sessions: Ray's client library keeps the first that it reads.
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


@contextmanager
def ctrl_c_deferred() -> Iterator[None]:
    """Keep the first Ctrl-C until the block ends: Ray, half started, may swallow it or leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    handler = signal.getsignal(signal.SIGINT)

    def keep(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, handler)  # A second one acts at once.

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _joined_ray(config: ClusterConfig) -> Iterator[None]:
    import ray

    access = find_access(config.address or "auto")
    check_access(access, allow_open=config.allow_without_token)
    host, _, port = access.gcs_address.rpartition(":")
    if host in ("127.0.0.1", "localhost"):
        _stay_on_loopback(host, port)
    with authenticated(dict(access.variables)):
        try:
            ray.init(
                address=access.gcs_address,
                # Where a machine has several addresses, the node of this driver is the one that we started.
                _node_ip_address=access.node and access.node.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterUnreachable(
                f"cannot join the Ray cluster at {access.gcs_address}: {error}\nThe driver must run on a node of the "
                "cluster, with the cluster's Ray version and token: start it there, or use `trimtab submit`"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _stay_on_loopback(host: str, port: str) -> None:
    """Ray would take this machine's outer address instead, and retry for minutes where only loopback listens."""
    from ray._private import ray_constants, services

    try:
        check_answers(f"{services.resolve_ip_for_localhost(host)}:{port}")
    except ClusterUnreachable:
        ray_constants.ENABLE_RAY_CLUSTER = False


def forwarded_environment() -> dict[str, str]:
    """The driver's variables that every worker needs. Never secrets: Ray's dashboard may show them.

    Only what steers the transport of a rank: the whole environment would carry launcher variables (SLURM_, PMI_) along.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(TRANSPORT_PREFIXES)}
