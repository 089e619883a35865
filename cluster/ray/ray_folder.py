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
OF_MKDTEMP = "12345678"  # as many characters as it appends
LOCK = "driver.lock"
END_S = 5.0


@contextmanager
def own_folder() -> Iterator[Path]:
    """Make a folder for this driver's Ray, removed at the end. First remove those that killed drivers left behind.

    The kernel gives a lock back when its process ends, however it ends: a folder whose lock is free has no driver.
    """
    remove_left_overs()
    # Private (0700): Ray opens its own folder to everybody, so it gets one inside.
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=ray_folder()))
    with (folder / f"{LOCK}.new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{LOCK}.new").rename(folder / LOCK)  # so that under this name the lock is never free while we live
        try:
            yield folder
        finally:
            end_processes_of(folder)
            shutil.rmtree(folder, ignore_errors=True)


def check_folder() -> None:
    """Raise InvalidValue where RAY_TMPDIR names no folder that can be written, or one without room for sockets."""
    if not os.access(folder := ray_folder(), os.W_OK | os.X_OK):
        raise InvalidValue(f"you cannot write {folder}, where Ray's files go; set RAY_TMPDIR to a folder that you can")
    check_room_for_sockets(folder / f"{PREFIX}{OF_MKDTEMP}", STORE_SOCKET)


def remove_left_overs() -> None:
    """End the Ray processes of this user's killed drivers, and remove their folders."""
    for path in ray_folder().glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), path.open() as lock:  # of another user, or just removed
            if path.stat().st_uid == os.getuid() and _is_free(lock):
                end_processes_of(path.parent)
                shutil.rmtree(path.parent, ignore_errors=True)


def end_processes_of(folder: Path) -> None:
    """Kill the processes of Ray that have a file below `folder` open.

    Ray's two agents, in Python, outlive a killed raylet by minutes. They rename themselves: only their logs tell whose
    they are.
    """
    users = [process for process in _users_of(folder) if _is_of_ray(process)]
    for process in users:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    wait_gone(users, END_S)


def _is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_of_ray(process: Process) -> bool:
    """Whether it is one of Ray's own processes, and no driver or log reader: by its package path or name ray::NAME."""
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
