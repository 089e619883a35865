"""Processes that run beside a training run and only read its directory: if one fails, the training goes on."""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Self

END_S = 30.0  # Longest wait at the end of a run, for the companion to send the last metrics.
END_AFTER_ERROR_S = 5.0  # The same after an error or Ctrl-C, when the user waits for the command to end.
_MAX_ERROR_BYTES = 4_000  # of the end of its standard error, whose last line is shown


class Companion:
    """A context manager: within it, one of our modules runs in a process of its own.

    The module must end when its standard input ends. That happens when the context ends, and also when this process is
    killed. It runs in a session of its own, so that Ctrl-C does not reach it.

    Args:
        name: its name in messages to the user.
        arguments: the module and its arguments.
        hear: called on a thread with each line that the process prints, and with a message if it fails.
        may_outlive: what happens if it has not ended END_S after its input: True leaves it running, False kills it.
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
        self._errors = tempfile.TemporaryFile()  # A pipe could fill up and block the process. `_listen` closes it.
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
        _opened(self._process.stdin).close()
        self._thread.join(END_S if error is None else END_AFTER_ERROR_S)
        if self._thread.is_alive() and not self._may_outlive:
            self._process.kill()
            self._thread.join()
        elif self._thread.is_alive():
            self._hear(f"{self._name}: still at work after the run's end; process {self._process.pid} goes on alone")

    def _listen(self) -> None:
        with _opened(self._process.stdout) as lines, self._errors as errors:
            for line in lines:
                self._hear(line.rstrip("\n"))
            if code := self._process.wait():
                errors.seek(max(0, errors.seek(0, 2) - _MAX_ERROR_BYTES))
                # The last line of a traceback names the exception.
                cause = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                self._hear(f"{self._name}: ended with exit code {code}{cause and f' ({cause})'}; the run goes on")


def _opened(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # noqa: S101 Popen was told to open it.
    return pipe


def loggers_beside(
    run_dir: Path, names: Sequence[str], warn: Callable[[str], None]
) -> AbstractContextManager[Companion | None]:
    """Feed these loggers while the run trains. warn: called with each of their errors."""
    if not names:
        return nullcontext()
    return Companion("run.log_to", ["runtime.loggers", str(run_dir.absolute()), *names], warn)


def page_beside(
    run_dir: Path, say: Callable[[str], None], *, is_wanted: bool
) -> AbstractContextManager[Companion | None]:
    """Serve the live page of the run while it trains. say: called with the page's URL, and with its errors."""
    if not is_wanted:
        return nullcontext()
    arguments = ["runtime", "watch", str(run_dir.absolute()), "--wait", "--until-input-ends"]
    return Companion(
        "watch",
        arguments,
        lambda text: say(text if text.startswith("watch: ") else f"watch  {text}"),
        may_outlive=False,
    )
