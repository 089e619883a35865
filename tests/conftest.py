"""For the whole suite: one thread a process, reasons for skipped GPU tests, one local Ray, nobody left behind."""

import gc
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
import torch
from hypothesis import settings

from tests.one_process import OPTION, OneProcess
from tests.ray_fixture import ray_session

__all__ = ["ray_session"]

SERVERS_OF_PYTHON = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")  # end with this process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION, action="store_true", help="skip a test where it would start a process, as `make check` does"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core; half as many again for the slow tests, which wait for Ray and for processes that end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores * 3 // 2 if config.option.markexpr == "slow" else cores


def pytest_configure(config: pytest.Config) -> None:
    # On hypothesis's own profile, which in CI repeats its choices. A deadline would measure what else the machine does.
    settings.register_profile("whole suite", settings.default, deadline=None)
    settings.register_profile("check", settings.default, max_examples=15, deadline=None)
    settings.load_profile("check" if config.getoption(OPTION) else "whole suite")
    if config.getoption(OPTION):
        plugin = OneProcess()
        plugin.install()
        config.pluginmanager.register(plugin)
    gc.disable()  # until all is imported: a look at torch, Ray and transformers takes half a second, each time
    # A shell that runs a command in the background lets it ignore Ctrl-C, and so would every process that a test
    # starts, and interrupts to see it end.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
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


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays
    gc.enable()


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
