import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dispatch.errors import InvalidValue
from runtime.runs import run_lock
from runtime.runs.run_lock import Owner, hold, hold_new
from workers.record.run_fence import RunDirectoryLost

HOLDER = """
    import sys
    from pathlib import Path
    from runtime.runs.run_lock import hold
    with hold(Path(sys.argv[1]), print):
        print("held", flush=True)
        sys.stdin.read()
"""


def silent(text: str) -> None:
    raise AssertionError(f"nothing should be said: {text}")


def holder(run: Path) -> subprocess.Popen[str]:
    """Another process that owns `run`."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def lock_of(run: Path) -> Path:
    (path,) = run.glob("run.lock.*")
    return path


def leave_lock(run: Path, **changes: object) -> Path:
    """A lock file as an owner leaves it that is not of this process."""
    path = run / "run.lock.00000003"
    path.touch()
    owner = replace(Owner.this_process(path.stat().st_ino), **changes)
    path.write_text(json.dumps({**asdict(owner), "beat": "000000000007"}))
    return path


def test_a_second_writer_is_refused_at_once_and_the_end_of_the_first_lets_it_in(tmp_path: Path) -> None:
    first = holder(tmp_path)
    before = lock_of(tmp_path)
    begun = time.monotonic()
    with pytest.raises(InvalidValue, match=rf"written by pid {first.pid} on .* since .*trimtab stop {tmp_path}$"):
        hold(tmp_path, silent).__enter__()
    assert time.monotonic() - begun < 1.0
    assert list(tmp_path.iterdir()) == [before]
    first.communicate("")
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path, silent):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with hold(tmp_path, silent) as lock:
        assert lock.path.name == "run.lock.00000002"
        assert list(tmp_path.iterdir()) == [lock.path]


def test_a_power_cut_leaves_a_lock_that_is_taken_over_at_once(tmp_path: Path) -> None:
    path = leave_lock(tmp_path, boot_id="of the boot before")
    os.utime(path, (1e9, 1e9))
    with hold(tmp_path, silent):
        assert not path.exists()


def test_a_copy_of_a_living_run_has_no_owner(tmp_path: Path) -> None:
    copy = leave_lock(tmp_path, inode=1)
    with hold(tmp_path, silent):
        assert not copy.exists()


def test_the_lock_of_another_host_is_taken_over_when_its_lease_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LEASE_S", 0.3)
    leave_lock(tmp_path, host="far", boot_id="of far")
    said: list[str] = []
    with hold(tmp_path, said.append):
        pass
    assert "pid" in said[0] and "on far since" in said[0] and "looking for 0 s" in said[0]


def test_another_host_that_renews_its_lease_keeps_its_run(tmp_path: Path) -> None:
    path = leave_lock(tmp_path, host="far", boot_id="of far")

    def renew(_: str) -> None:
        later = path.read_text().replace('7"}', '8"}')
        threading.Timer(0.1, path.write_text, [later]).start()

    with pytest.raises(InvalidValue, match=r"on far since .* ssh far kill"):
        hold(tmp_path, renew).__enter__()


def test_an_owner_whose_lock_is_removed_while_it_is_read_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = leave_lock(tmp_path, inode=1), run_lock._read
    looks = iter([read, Path.unlink])  # the second comes when a successor has removed it

    def look(lock: Path) -> Owner | None:
        return next(looks)(lock)

    monkeypatch.setattr(run_lock, "_read", look)
    run_lock._wait_until_gone(tmp_path, path, silent)


def test_one_of_many_who_take_over_wins(tmp_path: Path) -> None:
    leave_lock(tmp_path, inode=1)
    gate, won, lost = threading.Barrier(8), [], []

    def take() -> None:
        context = hold(tmp_path, silent)
        gate.wait()
        try:
            context.__enter__()
            won.append(context)
        except InvalidValue as error:
            lost.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    won[0].__exit__(None, None, None)


def test_an_owner_that_was_taken_over_finds_out_and_leaves_the_lock_alone(tmp_path: Path) -> None:
    with hold(tmp_path, silent) as lock:
        lock.check()
        lock.path.unlink()
        other = leave_lock(tmp_path)
        with pytest.raises(RunDirectoryLost, match="stops and writes no more"):
            lock.check()
        with pytest.raises(RunDirectoryLost):
            lock.fence.check()
    assert other.exists()


def test_a_new_run_that_never_trained_leaves_its_name_free(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    before = os.umask(0)
    try:
        for _ in range(2):
            with pytest.raises(KeyError), hold_new(run, silent):
                assert run.stat().st_mode & 0o777 == 0o700
                (run / "config.yaml").write_text("")
                raise KeyError
            assert not run.exists()
    finally:
        os.umask(before)
    run.mkdir()
    leave_lock(run, inode=1)  # a start that was killed before any training
    with hold_new(run, silent):
        (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InvalidValue, match="exists already; choose another --name, remove it, or go on with --resume"):
        hold_new(run, silent).__enter__()
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("folder", ["file", "file/runs", "/proc/runs"])
def test_a_folder_of_runs_that_cannot_be_made_is_refused_with_its_setting(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidValue, match=r"run.dir \(.*\) cannot be a folder .*; choose another with --run.dir"):
        hold_new(tmp_path / folder / "first", print).__enter__()


def test_a_disk_that_takes_no_lock_is_told_with_the_run_and_not_with_a_name_that_nobody_knows(tmp_path, monkeypatch):
    def full(fd: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path}'")):
        hold(tmp_path, print).__enter__()
    assert list(tmp_path.iterdir()) == []
