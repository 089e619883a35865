"""One run, one writer: a process that writes a run directory holds a lock file in it, from its first write to its end.

The lock file `run.lock.<n>` names its owner: host, boot, process and command. The owner of a directory is the process
that made the file with the highest n. It renews its lease: every BEAT_S seconds it writes a new count into the file. A
process that finds that the owner is gone makes the file n + 1. It makes it by `link`, which fails if the name exists,
atomically on every file system, NFS included: so only one of two processes succeeds. The owner also holds a `flock`.
Where the file system has it, others see by it at once that the owner lives.

docs/recovery.md describes what a user sees of it.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.machine.processes import PROC, process_of
from dispatch.errors import InvalidValue
from runtime.runs.run_dir import CONFIG_FILE
from workers.record.run_fence import RunDirectoryLost, RunFence, directory_lost
from workers.record.run_log import EVENTS

PREFIX = "run.lock."
BEAT_S = 2.0
# After so long without a renewal an owner on another host counts as gone: 15 renewals, so that a pause of a file server
# does not cost a living run its directory.
LEASE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that owns a run directory.

    inode: number of the lock file's inode; in a copy of the run it differs, so that the copy has no owner. started:
    start of the process in clock ticks since the boot (`cluster.machine.processes`). since: Unix time.
    """

    token: str
    inode: int
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: int
    command: str
    since: float

    @classmethod
    def this_process(cls, inode: int) -> "Owner":
        """This process as an owner, with a new token. inode: that of its lock file."""
        myself = process_of(os.getpid())
        return cls(
            token=secrets.token_hex(16),
            inode=inode,
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=myself.started if myself else 0,
            command=shlex.join(["trimtab", *sys.argv[1:]])[:500],
            since=time.time(),
        )

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"pid {self.pid} on {self.host} since {since} ({self.command})"

    def is_local(self) -> bool:
        """Whether its pid can be looked up here: it is of this boot of this machine and of this pid namespace."""
        return self.boot_id == _boot_id() and self.pid_namespace == _pid_namespace()

    def is_gone(self, status: os.stat_result) -> bool | None:
        """Whether the process has ended; None if this host cannot tell. status: that of its lock file."""
        if status.st_ino != self.inode:
            return True
        if self.is_local():
            found = process_of(self.pid)
            return found is None or found.started != self.started or not found.alive
        # The owner was on this host, and a reboot ended it. If it is on another host of the same name and lives, it has
        # renewed the file since our boot.
        rebooted = self.host == socket.gethostname() and self.boot_id != _boot_id() and status.st_mtime < _boot_time()
        return True if rebooted else None


class RunLock:
    """A run directory that this process owns. `hold` makes it; a thread renews the lease."""

    def __init__(self, path: Path, owner: Owner, fd: int) -> None:
        self.path, self.owner, self._fd = path, owner, fd
        self.fence = RunFence(path.absolute(), owner.token)
        self._lost: RunDirectoryLost | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RunDirectoryLost if the directory was removed, replaced or taken over."""
        if self._lost is not None:
            raise self._lost
        try:
            self.fence.check()
            if _newest(self.path.parent) != self.path:
                raise directory_lost(self.path.parent, "another process took it over")
        except RunDirectoryLost as error:
            self._lost = error
            raise

    def is_held(self) -> bool:
        """Whether this process may still write into the directory."""
        try:
            self.check()
        except RunDirectoryLost:
            return False
        return True

    def release(self) -> None:
        """Give the directory up."""
        self._stop.set()
        self._thread.join()
        if self.is_held():
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _renew(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(OSError):  # A full disk, for example: then this renewal is missing.
                os.pwrite(self._fd, _content(self.owner, beat), 0)


@contextmanager
def hold(run_dir: Path, say: Callable[[str], None]) -> Iterator[RunLock]:
    """Own an existing run directory within the block.

    say: called with a message if it may take LEASE_S, since this host cannot tell whether the last owner still lives.

    Raises:
        InvalidValue: another process owns the directory; the message names it.
    """
    try:
        lock = _acquire(run_dir, say)
    except OSError as error:  # It names no file (a full disk), or our temporary one: the user knows the directory.
        raise OSError(error.errno, error.strerror, str(run_dir)) from error
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def hold_new(run_dir: Path, say: Callable[[str], None]) -> Iterator[RunLock]:
    """Make the directory of a new run, readable by its owner alone, and own it within the block.

    If no training has begun at the end, the directory is removed, so that the name is free again. A directory that a
    start left which was killed before its training began is taken over.

    Raises:
        InvalidValue: the directory holds a run, another process owns it, or its parent folder cannot be made.
    """
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:  # a file, or /proc, on the way to it
        raise InvalidValue(
            f"run.dir ({run_dir.parent}) cannot be a folder ({error.strerror}); choose another with --run.dir"
        ) from error
    try:
        run_dir.mkdir(mode=0o700)
    except FileExistsError as error:
        refuse_if_owned(run_dir)
        if not _holds_nothing(run_dir):
            raise InvalidValue(
                f"the run directory {run_dir} exists already; choose another --name, remove it, or go on with "
                f"--resume {run_dir}"
            ) from error
    else:
        run_dir.chmod(0o700)  # `mkdir` applies the umask, which may take the owner's own rights away
    try:
        with hold(run_dir, say) as lock:
            try:
                yield lock
            finally:
                if lock.is_held() and _holds_nothing(run_dir):
                    for name in (CONFIG_FILE, EVENTS):
                        (run_dir / name).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # It is not empty: it holds a run, or another process has begun one there.
            run_dir.rmdir()


def refuse_if_owned(run_dir: Path) -> None:
    """Raise InvalidValue if the directory's owner is known to live, by `flock` or by its pid here. Does not wait."""
    path = _newest(run_dir)
    if path is not None and _is_gone(path) is False:
        raise _owned(run_dir, _read(path))


def owner_of(run_dir: Path) -> Owner | None:
    """The owner of the directory; None if there is none, or if it is known to have ended. Does not wait."""
    path = _newest(run_dir)
    return None if path is None or _is_gone(path) else _read(path)


def _acquire(run_dir: Path, say: Callable[[str], None]) -> RunLock:
    before = _newest(run_dir)
    if before is not None:
        _wait_until_gone(run_dir, before, say)
    path = run_dir / f"{PREFIX}{_number(before) + 1:08d}"
    aside = run_dir / f".{PREFIX}{secrets.token_hex(8)}.tmp"
    fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    owner = Owner.this_process(os.fstat(fd).st_ino)
    try:
        os.write(fd, _content(owner, 0))
        os.fsync(fd)  # After a power cut the file must still name its owner, or nobody could tell that it is gone.
        with contextlib.suppress(OSError):  # a file system without flock
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(aside, path)
        # Since `before` was read, other processes may have come and gone and left a higher number.
        if _newest(run_dir) != path:
            path.unlink()
            raise FileExistsError(errno.EEXIST, "another process was faster", str(path))
    except FileExistsError as error:
        os.close(fd)
        newest = _newest(run_dir)
        raise _owned(run_dir, _read(newest) if newest else None) from error
    except BaseException:
        os.close(fd)
        raise
    finally:
        aside.unlink(missing_ok=True)
    for old in _lock_files(run_dir):
        if _number(old) < _number(path):
            old.unlink(missing_ok=True)
    return RunLock(path, owner, fd)


def _wait_until_gone(run_dir: Path, path: Path, say: Callable[[str], None]) -> None:
    """Return once the owner is known to be gone, at the latest after LEASE_S without a renewal.

    Raises:
        InvalidValue: the owner is known to live.
    """
    owner, gone = _read(path), _is_gone(path)
    if gone:
        return
    if gone is False:
        raise _owned(run_dir, owner)
    say(
        f"{run_dir} was held by {owner or 'a process that left no name'}; looking for {LEASE_S:.0f} s whether it still "
        "lives"
    )
    first, until = _content_of(path), time.monotonic() + LEASE_S
    while time.monotonic() < until:
        time.sleep(min(BEAT_S / 4, LEASE_S / 4))
        if (now := _content_of(path)) is None:
            return
        if now != first:
            raise _owned(run_dir, owner)


def _owned(run_dir: Path, owner: Owner | None) -> InvalidValue:
    if owner is None:
        return InvalidValue(f"{run_dir} is being written by another process; wait for its end")
    stop = f"trimtab stop {run_dir}" if owner.is_local() else f"ssh {owner.host} kill {owner.pid}"
    return InvalidValue(
        f"{run_dir} is being written by {owner}; wait for its end, or stop it, which saves its state, with: {stop}"
    )


def _holds_nothing(run_dir: Path) -> bool:
    """Whether the directory holds only what a start leaves that never trained: no record, checkpoint or other file."""
    names = {path.name for path in run_dir.iterdir()}
    return all(name in (CONFIG_FILE, EVENTS) or name.lstrip(".").startswith(PREFIX) for name in names)


def _lock_files(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]


def _newest(run_dir: Path) -> Path | None:
    return max(_lock_files(run_dir), key=_number, default=None)


def _number(path: Path | None) -> int:
    return 0 if path is None else int(path.name.removeprefix(PREFIX))


def _content(owner: Owner, beat: int) -> bytes:
    # The length is constant, since a renewal overwrites the content in place.
    return json.dumps({**asdict(owner), "beat": f"{beat:012d}"}).encode() + b"\n"


def _content_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _read(path: Path) -> Owner | None:
    try:
        values = json.loads(path.read_bytes())
        values.pop("beat")
        return Owner(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # damaged by a power cut, or not a lock file of ours


def _is_gone(path: Path) -> bool | None:
    """Whether the owner that a lock file names has ended; None where only its lease can tell."""
    if _is_flocked(path):
        return False
    try:
        status = path.stat()
    except FileNotFoundError:
        return True
    owner = _read(path)
    if owner is None:
        return None if path.exists() else True  # A new owner removes the files of earlier ones.
    return owner.is_gone(status)


def _is_flocked(path: Path) -> bool:
    """Whether a process holds a `flock` on the file; False also if the file system has no flock."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not block each other
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _boot_id() -> str:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _boot_time() -> float:
    for line in (PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0


def _pid_namespace() -> str:
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""
