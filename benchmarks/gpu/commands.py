"""Commands that a section runs, as a user would."""

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

POLL_S, STOP_S = 1.0, 10.0


class CommandFailed(RuntimeError):
    """A command ended with another code than 0; the message has its beginning, the code, and what it said last."""


def run_module(*arguments: str, on_poll: Callable[[], object] | None = None) -> str:
    """What `python -m ARGUMENTS` prints on standard output and error. on_poll: called every second meanwhile.

    Raises:
        CommandFailed: it ended with another code than 0.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=output)  # noqa: S603
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                if on_poll is not None:
                    on_poll()
        finally:
            _stop(process)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    if process.returncode:
        sys.stderr.write(printed)
        last = (printed.strip().splitlines() or ["nothing"])[-1]
        raise CommandFailed(f"{' '.join(arguments[:2])} ended with code {process.returncode} and said last: {last}")
    return printed


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Where we are interrupted. A training stops after its step at the first signal, at once at the second."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
    process.kill()
    process.wait()
