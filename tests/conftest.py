"""For the whole suite: one thread a process, reasons for skipped GPU tests, nobody left behind."""

import os
from collections.abc import Iterator

import psutil
import pytest
import torch

SERVERS_OF_PYTHON = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")  # end with this process


def pytest_configure() -> None:
    # Inherited by every process that a test starts: two ranks on two cores must not run four threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA device; torch {torch.__version__} sees none on this machine"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    """Set up first, hence torn down last: after the shared Ray cluster is closed."""
    yield
    _, alive = psutil.wait_procs([p for p in psutil.Process().children(recursive=True) if not _ends_with_us(p)], 15)
    assert not alive, f"the suite left processes behind: {[' '.join(p.cmdline()) or p for p in alive]}"


def _ends_with_us(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
        # A rank has its server's command line; one that outlives its test is a leftover.
        is_server = process.ppid() == os.getpid()
    except psutil.NoSuchProcess:
        return True
    return is_server and any(server in command for server in SERVERS_OF_PYTHON)
