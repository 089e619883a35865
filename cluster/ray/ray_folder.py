"""The private folder of a local Ray, and the removal of folders whose driver was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.machine.node_state import STORE_SOCKET, check_room_for_sockets, ray_folder
from cluster.machine.processes import PROC, Process, process_of, wait_gone
from dispatch.errors import InvalidValue

PREFIX = "trimtab-ray-"
MKDTEMP_SUFFIX = "12345678"  # as long as what tempfile.mkdtemp appends
LOCK = "driver.lock"
KILL_WAIT_S = 5.0  # for killed processes to end


@contextmanager
def own_folder() -> Iterator[Path]:
    """Make a folder for this driver's Ray, removed at the end. First remove those that killed drivers left behind.

    The driver holds a lock on a file in the folder. The kernel frees the lock when the process ends, however it ends:
    so a folder whose lock is free has no driver any more.
    """
    remove_left_overs()
    # mkdtemp makes it private (0700). Ray opens its folder to all users, and so gets one inside.
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=ray_folder()))
    with (folder / f"{LOCK}.new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Renamed only now, when it is locked: else another driver could find it free, and remove the folder.
        (folder / f"{LOCK}.new").rename(folder / LOCK)
        try:
            yield folder
        finally:
            end_processes_of(folder)
            shutil.rmtree(folder, ignore_errors=True)


def check_folder() -> None:
    """Raise InvalidValue if RAY_TMPDIR names no folder that can be written, or one with too long a path for sockets."""
    if not os.access(folder := ray_folder(), os.W_OK | os.X_OK):
        raise InvalidValue(f"you cannot write {folder}, where Ray's files go; set RAY_TMPDIR to a folder that you can")
    check_room_for_sockets(folder / f"{PREFIX}{MKDTEMP_SUFFIX}", STORE_SOCKET)


def remove_left_overs() -> None:
    """End the Ray processes of this user's killed drivers, and remove their folders."""
    for path in ray_folder().glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), path.open() as lock:  # of another user, or just removed
            if path.stat().st_uid == os.getuid() and _is_free(lock):
                end_processes_of(path.parent)
                shutil.rmtree(path.parent, ignore_errors=True)


def end_processes_of(folder: Path) -> None:
    """Kill the processes of Ray that have a file below `folder` open.

    Ray's two agents (Python processes) outlive a killed raylet by minutes. They change their command line, so that only
    the log files that they hold open show to which Ray they belong.
    """
    users = [process for process in _users_of(folder) if _is_of_ray(process)]
    for process in users:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    wait_gone(users, KILL_WAIT_S)


def _is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_of_ray(process: Process) -> bool:
    """Whether it is one of Ray's own processes, by its name ray::NAME or the path of Ray's package in its command line.

    A driver, or a program that reads the logs, has files below the folder open too, and must not be killed.
    """
    try:
        words = (PROC / str(process.pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return words[0].startswith("ray::") or any(
        f"{os.sep}site-packages{os.sep}ray{os.sep}" in word for word in words[:4]
    )


def _users_of(folder: Path) -> list[Process]:
    start = f"{folder}{os.sep}"
    found = []
    for descriptors in PROC.glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(str(each.readlink()).startswith(start) for each in descriptors.iterdir()):
                found.append(process_of(int(descriptors.parent.name)))
    return [process for process in found if process is not None]
