"""`pytest --one-process`: a test that would start a process is skipped at that moment. `make check` runs what is left.

Which tests these are is nowhere written down, so that no list has to be kept: whoever starts a process, in a test, a
fixture or the code under test, is noticed here.
"""

import multiprocessing.process
import sys
from collections.abc import Iterator
from typing import Any

import pytest

OPTION = "--one-process"
STARTS = frozenset(["subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"])


class OneProcess:
    """The plugin; Python offers no way to take an audit hook away again, so it looks whether a test runs."""

    def __init__(self) -> None:
        self._in_test = False

    def install(self) -> None:
        """Have all ways to start a process pass by here."""
        sys.addaudithook(self._on_event)
        start = multiprocessing.process.BaseProcess.start

        def start_or_skip(process: multiprocessing.process.BaseProcess) -> None:
            self._skip_in_test()  # a process of a fork server, which may run already, starts without an event
            start(process)

        multiprocessing.process.BaseProcess.start = start_or_skip  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[Any]:
        """Look at the test with its fixtures, and not at what pytest does between tests."""
        self._in_test = True
        try:
            return (yield)
        finally:
            self._in_test = False

    def _on_event(self, event: str, _: tuple[Any, ...]) -> None:
        if event in STARTS:
            self._skip_in_test()

    def _skip_in_test(self) -> None:
        if self._in_test:
            pytest.skip("starts a process")
