"""What this machine's user has started by `trimtab cluster`: one folder a node, with a file that says how to end it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.machine.processes import Process, family
from dispatch.errors import InvalidValue, UserError

# Ray names its session by the time and the pid of the head, which has up to 7 digits, and puts its sockets below that.
BEFORE_SOCKET = "/r/session_2026-01-31_23-59-59_999999_4194303/sockets/"
STORE_SOCKET = "plasma_store"  # the longest name on a node without a dashboard
DASHBOARD_SOCKET = "dash_MetricsHead"  # the longest on a head with ray[default]
SOCKET_BYTES = 107  # of a Unix socket's path, without the 0 behind it
STATE_FILE = "node.json"
LOG_FILE = "ray.log"


class NodeStillThere(UserError, RuntimeError):
    """A node could not be ended."""


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """A Ray node of this machine. `leader` heads the session that all its processes belong to."""

    address: str
    """IP address that it announces; no two nodes of a machine share one."""
    gcs_address: str
    """HOST:PORT of the cluster's head."""
    is_head: bool
    dashboard: str | None
    """URL of dashboard and job API; None on a node that joined, and where ray[default] is not installed."""
    token_file: str | None
    """None: the cluster takes anybody."""
    leader: Process

    @property
    def folder(self) -> Path:
        return node_folder(self.address)

    @property
    def alive(self) -> bool:
        """Whether its `ray start` runs. What a crash left of it is in `family(leader)`."""
        return self.leader.alive

    def write(self) -> None:
        """Write the state file into the node's folder, which must exist: whole or not at all."""
        aside = self.folder / f"{STATE_FILE}.new"
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(self.folder / STATE_FILE)


def ray_folder() -> Path:
    """Where a local Ray keeps its logs and sockets. Not TMPDIR, which may be too long for a socket's path.

    Raises:
        ValueError: RAY_TMPDIR names no folder.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp").absolute()  # noqa: S108 A private folder is made in it.
    if not folder.is_dir():
        raise InvalidValue(f"RAY_TMPDIR ({folder}) must be a folder that exists; make it, or unset RAY_TMPDIR for /tmp")
    return folder


def check_room_for_sockets(folder: Path, longest_name: str) -> None:
    """Raise InvalidValue where the path of Ray's socket of this name below `folder` is longer than the system takes."""
    size, most = len(os.fsencode(folder)), SOCKET_BYTES - len(BEFORE_SOCKET) - len(longest_name)
    if size > most:
        raise InvalidValue(
            f"the folder for Ray's files, {folder}, is {size} bytes long, more than the {most} that leave room for the "
            f"sockets in it; set RAY_TMPDIR to a folder whose path is at least {size - most} bytes shorter than "
            f"{ray_folder()}"
        )


def nodes_folder() -> Path:
    """Return the folder of this user's nodes, made if it is missing; only this user may read or write it.

    On this machine's own disk, since processes are of one machine.

    Raises:
        ValueError: somebody else made it.
    """
    folder = _place()
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise InvalidValue(
            f"{folder} must be a folder that only you can use, since it says which processes to end; remove it, or set "
            "RAY_TMPDIR to a folder of your own"
        )
    return folder


def node_folder(address: str) -> Path:
    """Where the node with this IP address keeps its state, log, sockets and Ray's session.

    Raises:
        ValueError: its path is too long for sockets.
    """
    folder = nodes_folder() / address
    check_room_for_sockets(folder, DASHBOARD_SOCKET)
    return folder


def read_nodes() -> list[NodeState]:
    """All nodes started here and not ended by `down`, the head first, whether they live or crashed."""
    if not _place().exists():  # a mere look leaves no folder behind
        return []
    found = [_read(path) for path in sorted(nodes_folder().glob(f"*/{STATE_FILE}"))]
    return sorted(found, key=lambda node: not node.is_head)


def live_nodes() -> list[NodeState]:
    """The nodes of this machine that run."""
    return [node for node in read_nodes() if node.alive]


def forget(node: NodeState) -> None:
    """Remove the folder of a node that has ended.

    Raises:
        NodeStillThere: a process of it lives, which could no longer be found without the folder.
    """
    if left := family(node.leader):
        raise NodeStillThere(f"processes {[each.pid for each in left]} of the node at {node.address} do not end")
    shutil.rmtree(node.folder, ignore_errors=True)


def _place() -> Path:
    # Short: with the longest user id and address it leaves just enough room for Ray's sockets below /tmp.
    return ray_folder() / f"tt-{os.getuid()}"


def _read(path: Path) -> NodeState:
    try:
        values = json.loads(path.read_text())
        return NodeState(**values | {"leader": Process(**values["leader"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidValue(
            f"{path} is not a state file of `trimtab cluster` ({error}); remove {path.parent}"
        ) from error
