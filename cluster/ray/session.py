"""Start a Ray of our own on this machine, or join one by address; leave it as it was found."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.machine.deferred_signals import stop_signals_deferred
from cluster.machine.search_path import job_config
from cluster.ray.access import check_access, find_access
from cluster.ray.local_ray import local_ray
from cluster.ray.probe import ClusterUnreachable, authenticated, check_answers
from workers.actor import TRANSPORT_PREFIXES


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """This process's connection to Ray while it is open.

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
            RayNotStarted: no Ray came up on this machine.

        Open it on a thread that outlives the session: the kernel ends a local Ray with the thread that started it
        (PR_SET_PDEATHSIG). Ctrl-C and a hang-up of the terminal reach only the driver: Ray masks SIGINT for its
        processes, and those of a local Ray are in sessions of their own.
        """
        import ray  # Takes half a second: imported only to open a session.

        begun = time.monotonic()
        if ray.is_initialized():
            yield cls(owned=False, open_s=0.0)
            return
        with local_ray(config) if config.address is None else _joined_ray(config):
            yield cls(owned=config.address is None, open_s=time.monotonic() - begun)


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
            with stop_signals_deferred():
                ray.init(
                    address=access.gcs_address,
                    # A machine may have several addresses. Ray finds the driver's node by the one that it announced.
                    _node_ip_address=access.node and access.node.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    job_config=job_config(),
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
    """Have Ray connect to a head that listens on loopback alone.

    By default Ray replaces a loopback address by this machine's outer one, and would retry that for minutes.
    """
    from ray._private import ray_constants, services

    try:
        check_answers(f"{services.resolve_ip_for_localhost(host)}:{port}")
    except ClusterUnreachable:
        ray_constants.ENABLE_RAY_CLUSTER = False


def forwarded_environment() -> dict[str, str]:
    """The driver's variables that every worker gets: only those that steer the transport of a rank.

    The whole environment would also carry secrets, which Ray's dashboard may show, and launcher variables (SLURM_,
    PMI_), which mislead libraries in the workers.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(TRANSPORT_PREFIXES)}
