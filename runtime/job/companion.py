"""Processes beside a run that only read its directory: the run does not notice what becomes of them."""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Self

END_S = 30.0  # for the last metrics
END_AFTER_ERROR_S = 5.0  # somebody may wait for the error, or have pressed Ctrl-C
_LAST_WORDS = 4_000  # bytes


class Companion:
    """A context manager: within it, a module of ours runs in a process of its own.

    The process ends when its standard input does: at the end, and when this process is killed. It has a session of its
    own, so that Ctrl-C does not reach it.

    Args:
        name: what it is for the user.
        arguments: its module and what follows.
        hear: called on a thread with each line that it prints, and with how it ended where it failed.
        may_outlive: whether it goes on alone where it has not ended END_S after its input; else it is killed.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        hear: Callable[[str], None],
        *,
        may_outlive: bool = True,
    ) -> None:
        self._name, self._hear, self._may_outlive = name, hear, may_outlive
        self._command = [sys.executable, "-P", "-m", *arguments]

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()  # the thread closes it
        self._process = subprocess.Popen(  # noqa: S603 - our own
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._listen, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        _end_of(self._process.stdin).close()
        self._thread.join(END_S if error is None else END_AFTER_ERROR_S)
        if self._thread.is_alive() and not self._may_outlive:
            self._process.kill()
            self._thread.join()
        elif self._thread.is_alive():
            self._hear(f"{self._name}: still at work after the run's end; process {self._process.pid} goes on alone")

    def _listen(self) -> None:
        with _end_of(self._process.stdout) as lines, self._errors as errors:
            for line in lines:
                self._hear(line.rstrip("\n"))
            if code := self._process.wait():
                errors.seek(max(0, errors.seek(0, 2) - _LAST_WORDS))
                words = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                self._hear(f"{self._name}: ended with exit code {code}{words and f' ({words})'}; the run goes on")


def _end_of(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 - the process was started with it
    return pipe


def loggers_beside(
    run_dir: Path, names: Sequence[str], warn: Callable[[str], None]
) -> AbstractContextManager[Companion | None]:
    """Feed these loggers while the run trains; what is wrong with them is warned of."""
    if not names:
        return nullcontext()
    return Companion("run.log_to", ["runtime.loggers", str(run_dir.absolute()), *names], warn)


def page_beside(
    run_dir: Path, say: Callable[[str], None], *, is_wanted: bool
) -> AbstractContextManager[Companion | None]:
    """Serve the live page of the run while it trains; the URL is said."""
    if not is_wanted:
        return nullcontext()
    arguments = ["runtime", "watch", str(run_dir.absolute()), "--wait", "--until-input-ends"]
    return Companion(
        "watch",
        arguments,
        lambda text: say(text if text.startswith("watch: ") else f"watch  {text}"),
        may_outlive=False,
    )
