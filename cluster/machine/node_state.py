"""The nodes that this user started on this machine by `trimtab cluster`: a folder each, with a file for `down`."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.machine.processes import Process, family
from dispatch.errors import InvalidValue, UserError

# The longest path between a node's folder and its sockets. Ray names a session by the time and by the pid of the head,
# which has at most 7 digits on Linux (4194304 is the largest pid_max).
BEFORE_SOCKET = "/r/session_2026-01-31_23-59-59_999999_4194303/sockets/"
STORE_SOCKET = "plasma_store"  # the longest socket name on a node without a dashboard
DASHBOARD_SOCKET = "dash_MetricsHead"  # the longest socket name on a head with ray[default]
SOCKET_BYTES = 107  # longest path of a Unix socket on Linux: sun_path has 108 bytes, with the 0 at the end
STATE_FILE = "node.json"
LOG_FILE = "ray.log"


class NodeStillThere(UserError, RuntimeError):
    """A node could not be ended."""


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """A Ray node of this machine. `leader` is the process of `ray start`, which leads the session of all others."""

    address: str
    """IP address that it announces; no two nodes of a machine share one."""
    gcs_address: str
    """HOST:PORT of the cluster's head."""
    is_head: bool
    dashboard: str | None
    """URL of dashboard and job API; None on a node that joined, and where ray[default] is not installed."""
    token_file: str | None
    """None: the cluster demands no token."""
    leader: Process

    @property
    def folder(self) -> Path:
        return node_folder(self.address)

    @property
    def alive(self) -> bool:
        """Whether its `ray start` runs. If it crashed, processes may be left: see `family(leader)`."""
        return self.leader.alive

    def write(self) -> None:
        """Write the state file, atomically, into the node's folder, which must exist."""
        aside = self.folder / f"{STATE_FILE}.new"
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(self.folder / STATE_FILE)


def ray_folder() -> Path:
    """The folder below which Ray keeps logs and sockets: RAY_TMPDIR, else /tmp. TMPDIR may be too long for sockets.

    Raises:
        InvalidValue: RAY_TMPDIR names no folder.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp").absolute()  # noqa: S108 A private folder is made in it.
    if not folder.is_dir():
        raise InvalidValue(f"RAY_TMPDIR ({folder}) must be a folder that exists; make it, or unset RAY_TMPDIR for /tmp")
    return folder


def check_room_for_sockets(folder: Path, longest_name: str) -> None:
    """Raise InvalidValue if the path of a socket with this name, below `folder`, would be too long for the system."""
    size, max_size = len(os.fsencode(folder)), SOCKET_BYTES - len(BEFORE_SOCKET) - len(longest_name)
    if size > max_size:
        raise InvalidValue(
            f"the path of the folder for Ray's files, {folder}, is {size} bytes long, more than the {max_size} that "
            f"leave room for the sockets in it; set RAY_TMPDIR to a folder whose path is at least {size - max_size} "
            f"bytes shorter than {ray_folder()}"
        )


def nodes_folder() -> Path:
    """Return the folder of this user's nodes, made if it is missing; only this user may read or write it.

    It must be on this machine's own disk, as the process ids in it are of this machine.

    Raises:
        InvalidValue: somebody else made it.
    """
    folder = _nodes_path()
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise InvalidValue(
            f"{folder} must be a folder that only you can use, since it says which processes to end; remove it, or set "
            "RAY_TMPDIR to a folder of your own"
        )
    return folder


def node_folder(address: str) -> Path:
    """The folder in which the node with this IP address keeps its state, log, sockets and Ray's session.

    Raises:
        InvalidValue: its path is too long for sockets.
    """
    folder = nodes_folder() / address
    check_room_for_sockets(folder, DASHBOARD_SOCKET)
    return folder


def read_nodes() -> list[NodeState]:
    """All nodes started here and not ended by `down`, the head first, whether they live or crashed."""
    if not _nodes_path().exists():  # `nodes_folder` would make it, and reading should leave nothing behind
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


def _nodes_path() -> Path:
    # A short name: with the longest user id and address it leaves just enough bytes for Ray's sockets below /tmp.
    return ray_folder() / f"tt-{os.getuid()}"


def _read(path: Path) -> NodeState:
    try:
        values = json.loads(path.read_text())
        return NodeState(**values | {"leader": Process(**values["leader"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidValue(
            f"{path} is not a state file of `trimtab cluster` ({error}); remove {path.parent}"
        ) from error
