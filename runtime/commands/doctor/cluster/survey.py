"""What was found on a cluster, as plain values: for `judge`, the tables and the JSON file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DRIVER = "driver"


@dataclass(frozen=True, kw_only=True)
class Space:
    """A file system or the memory, in bytes."""

    total: int
    free: int


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One machine. disks: by the path that was asked for; sources: a digest for each of Trimtab's packages."""

    host: str
    versions: Mapping[str, str]
    sources: Mapping[str, str]
    devices: tuple[Mapping[str, Any], ...]
    num_cores: int
    memory: Space
    shm: Space
    disks: Mapping[str, Space]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> "NodeFacts":
        """From what a probe answers."""
        return cls(
            host=answer["host"],
            versions=answer["versions"],
            sources=answer["sources"],
            devices=tuple(answer["devices"]),
            num_cores=answer["num_cores"],
            memory=Space(**answer["memory_bytes"]),
            shm=Space(**answer["shm_bytes"]),
            disks={path: Space(**space) for path, space in answer["disks"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A node's clock minus the driver's, in seconds, known to ± error_s."""

    offset_s: float
    error_s: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction between two nodes, over one TCP stream. error: why it was not measured; the figures are then 0."""

    sender: str
    receiver: str
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupSpeed:
    """All-to-all in one expert-parallel group while all groups do the same.

    small_s: of a message of few bytes to each rank. bytes_per_s: what a rank sends to others, of large ones.
    """

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    small_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything that was found.

    nodes: by address, with that of the driver's process under DRIVER. unreachable: why a node did not answer, by its
    address. gang_error: why no process group formed. rank_nodes: the address of each rank's node.
    """

    nodes: Mapping[str, NodeFacts]
    unreachable: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    groups: tuple[GroupSpeed, ...] = ()
    rank_nodes: tuple[str, ...] = ()
    device: str = "cpu"
    join_s: float = 0.0
    gang_error: str = ""
