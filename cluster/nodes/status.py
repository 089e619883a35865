"""Nodes and jobs of a cluster, read from its head without joining the cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.ray.access import Access
from cluster.ray.probe import authenticated


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """One node. Its resources are what Ray counts as its own to reserve, not what is measured on the machine."""

    address: str
    host: str
    alive: bool
    is_head: bool
    total: Mapping[str, float]
    """CPU, GPU in devices; memory, object_store_memory in bytes."""
    available: Mapping[str, float]
    labels: Mapping[str, str]
    actors: Mapping[str, Mapping[str, int]]
    """Living actors by job, then by name, or class where they have no name: {"02000000": {"WorkerActor": 2}}."""

    def used(self, resource: str) -> float:
        """How much of a resource is reserved."""
        return self.total.get(resource, 0.0) - self.available.get(resource, 0.0)


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """One running job: a driver with its actors."""

    job_id: str
    entrypoint: str
    """The driver's command line."""
    address: str
    """Of the node that the driver runs on."""
    started_ms: int
    """Unix time."""


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """A cluster at one moment. `nodes` begins with the head, and dead nodes are last."""

    nodes: tuple[NodeStatus, ...]
    jobs: tuple[JobStatus, ...]


def read_status(access: Access) -> ClusterStatus:
    """Ask the head, which takes milliseconds, apart from the import of Ray. Call `check_access` first."""
    with _global_state(access) as state:
        table, actors, jobs = state.node_table(), state.actor_table(None, None, None), state.job_table()
        available = state.available_resources_per_node()
    by_node: dict[str, dict[str, Counter[str]]] = {}
    for actor in actors.values():
        if actor["State"] == "ALIVE":
            job_actors = by_node.setdefault(actor["Address"]["NodeID"], {}).setdefault(actor["JobID"], Counter())
            job_actors[actor["Name"] or actor["ActorClassName"]] += 1
    nodes = (_node(row, available.get(row["NodeID"], {}), by_node.get(row["NodeID"], {})) for row in table)
    return ClusterStatus(
        nodes=tuple(sorted(nodes, key=lambda node: (not node.is_head, not node.alive, _octets(node.address)))),
        jobs=tuple(_job(row) for row in jobs if not row["IsDead"] and not _is_rays_own(row)),
    )


def _node(
    row: Mapping[str, Any], available: Mapping[str, float], actors: Mapping[str, Mapping[str, int]]
) -> NodeStatus:
    return NodeStatus(
        address=row["NodeManagerAddress"],
        host=row["NodeManagerHostname"],
        alive=row["Alive"],
        is_head="node:__internal_head__" in row["Resources"],
        total=row["Resources"],
        available=available,
        labels={name: value for name, value in row["Labels"].items() if not name.startswith("ray.io/node-")},
        actors=actors,
    )


def _is_rays_own(row: Mapping[str, Any]) -> bool:
    return bool(row["Entrypoint"].startswith("ray::"))  # Ray's agent that submits jobs is a driver, too


def _job(row: Mapping[str, Any]) -> JobStatus:
    return JobStatus(
        job_id=row["JobID"],
        entrypoint=row["Entrypoint"],
        address=row["DriverIPAddress"],
        started_ms=row["StartTime"],
    )


@contextmanager
def _global_state(access: Access) -> Iterator[Any]:
    from ray._private import services
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]

    address = access.gcs_address
    if address == "auto":
        address = services.canonicalize_bootstrap_address_or_die("auto")
    with authenticated(dict(access.variables)):
        state = GlobalState()
        state._initialize_global_state(  # noqa: SLF001 All public ways need a driver on a node of the cluster.
            GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        try:
            yield state
        finally:
            state.disconnect()


def _octets(address: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in address.split("."))
