"""`pytest --one-process` skips whoever starts a process while a test runs, and nobody else."""

import multiprocessing
import os
import subprocess
from collections.abc import Callable

import pytest

from tests.one_process import OneProcess
from tests.ranks import run_ranks


def _outcomes(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """What becomes of each way to start a process, in a test and after it."""
    plugin = OneProcess()
    plugin.install()  # for good, hence in a process of its own
    test = plugin.pytest_runtest_protocol()
    next(test)
    during = {name: _outcome(start) for name, start in WAYS.items()}
    with pytest.raises(StopIteration):
        next(test)
    return {name: (during[name], _outcome(start)) for name, start in WAYS.items()}


def _outcome(start: Callable[[], object]) -> str:
    try:
        start()
    except pytest.skip.Exception as skipped:
        return f"skipped: {skipped.msg}"
    except AssertionError as daemonic:  # Python's own: it was asked to start one, which a rank may not
        assert "daemonic processes" in str(daemonic)
    return "started"


def _fork() -> None:
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _multiprocessing() -> None:
    multiprocessing.get_context("forkserver").Process(target=os.getpid).start()


WAYS: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run(["true"], check=True),
    "fork": _fork,
    "multiprocessing": _multiprocessing,
}


def test_each_way_to_start_a_process_ends_a_test_and_only_a_test() -> None:
    [outcomes] = run_ranks(1, _outcomes)
    assert outcomes == dict.fromkeys(WAYS, ("skipped: starts a process", "started"))
