"""One run, one writer: who writes a run directory holds the lock file in it from before the first write to the end.

The lock file `run.lock.<n>` names its owner: host, boot, process, and the command. The owner writes a new count into it
every BEAT_S seconds (a lease). The owner of a directory is who made the file of the highest n. Whoever finds that the
owner is gone makes the next file; as a link that must not exist yet, that is atomic on every file system, NFS
included, so that one of two who try succeeds. `flock` shows at once, where a file system has it, that an owner lives.

docs/recovery.md says what a user sees of it.
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
from workers.record.run_fence import RunDirectoryLost, RunFence, lost
from workers.record.run_log import EVENTS

PREFIX = "run.lock."
BEAT_S = 2.0
LEASE_S = 30.0  # of an owner on another host: 15 renewals, which no pause of a file server should outlast


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that owns a run directory.

    inode: of the lock file; a copy of a run has another, and no owner. started: clock ticks since the boot, as of
    cluster.machine.processes. since: Unix time.
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
        """This process as an owner, with a token of its own."""
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

    def is_near(self) -> bool:
        """Whether its number names this process here: in this boot of this machine, and not in another container."""
        return self.boot_id == _boot_id() and self.pid_namespace == _pid_namespace()

    def is_gone(self, file: os.stat_result) -> bool | None:
        """Whether the process ended; None where this host cannot tell. file: the lock file, as old as its last sign."""
        if file.st_ino != self.inode:
            return True
        if self.is_near():
            found = process_of(self.pid)
            return found is None or found.started != self.started or not found.alive
        # A boot of this host ended it. Hosts can share a name: then it would have renewed the file since our boot.
        rebooted = self.host == socket.gethostname() and self.boot_id != _boot_id() and file.st_mtime < _boot_time()
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
        """Raise RunDirectoryLost where the directory is no longer this run's."""
        if self._lost is not None:
            raise self._lost
        try:
            self.fence.check()
            if _newest(self.path.parent) != self.path:
                raise lost(self.path.parent, "another process took it over")
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
            with contextlib.suppress(OSError):  # a full disk; who looks from another host sees no renewal meanwhile
                os.pwrite(self._fd, _content(self.owner, beat), 0)


@contextmanager
def hold(run_dir: Path, say: Callable[[str], None]) -> Iterator[RunLock]:
    """Own an existing run directory. `say` hears why it takes a while, where the owner before was on another host.

    Raises:
        InvalidValue: another process owns it; names it.
    """
    try:
        lock = _acquire(run_dir, say)
    except OSError as error:  # of a full disk without a name, or with that of a file that nobody else sees
        raise OSError(error.errno, error.strerror, str(run_dir)) from error
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def hold_new(run_dir: Path, say: Callable[[str], None]) -> Iterator[RunLock]:
    """Make the directory of a new run, for its owner's eyes alone, and own it.

    When no training began, nothing is left, so that the next start can have the name. What a start left that was
    killed before any training is taken over.

    Raises:
        InvalidValue: it exists and holds something, another process owns it, or its folder cannot be.
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
        run_dir.chmod(0o700)  # whatever the umask is
    try:
        with hold(run_dir, say) as lock:
            try:
                yield lock
            finally:
                if lock.is_held() and _holds_nothing(run_dir):
                    for name in (CONFIG_FILE, EVENTS):
                        (run_dir / name).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # it holds a run, or another start has it
            run_dir.rmdir()


def refuse_if_owned(run_dir: Path) -> None:
    """Raise InvalidValue where a process of this host, or one that `flock` shows, owns the directory. Does not wait."""
    path = _newest(run_dir)
    if path is not None and _is_gone(path) is False:
        raise _owned(run_dir, _read(path))


def owner_of(run_dir: Path) -> Owner | None:
    """Who owns the directory; None for nobody, or for one that is known to have ended. Does not wait."""
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
        os.fsync(fd)  # after a power cut it must say who was here
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(aside, path)
        # Who looked before a third process came and went may link a number below that of its successor.
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
    """Return once the owner is known to be gone. Raises InvalidValue as soon as it is known to live."""
    owner, gone = _read(path), _is_gone(path)
    if gone:
        return
    if gone is False:
        raise _owned(run_dir, owner)
    say(
        f"{run_dir} was held by {owner or 'a process that left no name'}; looking for {LEASE_S:.0f} s whether it still "
        "lives"
    )
    first, until = _bytes(path), time.monotonic() + LEASE_S
    while time.monotonic() < until:
        time.sleep(min(BEAT_S / 4, LEASE_S / 4))
        if (now := _bytes(path)) is None:
            return
        if now != first:
            raise _owned(run_dir, owner)


def _owned(run_dir: Path, owner: Owner | None) -> InvalidValue:
    if owner is None:
        return InvalidValue(f"{run_dir} is being written by another process; wait for its end")
    stop = f"trimtab stop {run_dir}" if owner.is_near() else f"ssh {owner.host} kill {owner.pid}"
    return InvalidValue(
        f"{run_dir} is being written by {owner}; wait for its end, or stop it, which saves its state, with: {stop}"
    )


def _holds_nothing(run_dir: Path) -> bool:
    """Whether there is no record, checkpoint or stranger's file: only what a start leaves that never trained."""
    names = {path.name for path in run_dir.iterdir()}
    return all(name in (CONFIG_FILE, EVENTS) or name.lstrip(".").startswith(PREFIX) for name in names)


def _lock_files(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]


def _newest(run_dir: Path) -> Path | None:
    return max(_lock_files(run_dir), key=_number, default=None)


def _number(path: Path | None) -> int:
    return 0 if path is None else int(path.name.removeprefix(PREFIX))


def _content(owner: Owner, beat: int) -> bytes:
    # Of constant length: a renewal writes over the one before.
    return json.dumps({**asdict(owner), "beat": f"{beat:012d}"}).encode() + b"\n"


def _bytes(path: Path) -> bytes | None:
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
        return None  # torn by a power cut, or not ours


def _is_gone(path: Path) -> bool | None:
    """Whether the owner that a lock file names has ended; None where only its lease can tell."""
    if _is_flocked(path):
        return False
    try:
        file = path.stat()
    except FileNotFoundError:
        return True
    owner = _read(path)
    if owner is None:
        return None if path.exists() else True  # its successor removed it meanwhile
    return owner.is_gone(file)


def _is_flocked(path: Path) -> bool:
    """Whether a process holds it by `flock`; False also where the file system cannot say."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not take each other for an owner
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _boot_id() -> str:
    return _first_line(PROC / "sys/kernel/random/boot_id")


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


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
