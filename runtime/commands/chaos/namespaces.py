"""Linux namespaces held by a process that ends with its owner, however that ends.

Nothing has a name on the host: when the holder is gone, the kernel takes its processes, network and mounts with it.
"""

import contextlib
import functools
import os
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dispatch.errors import UserError

COMMAND_S = 10.0  # For one command of iproute2 or util-linux: they take milliseconds.
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
KINDS = ("--net", "--pid", "--mount", "--uts")

# The first process of a PID namespace inherits all orphans: where SIGCHLD is ignored the kernel reaps them. As zombies
# they would pass for alive: a worker of Ray trains on for a minute beside such a raylet. (dash cannot ignore it.)
_REAP = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); sys.stdin.read()"


class NamespaceError(UserError, RuntimeError):
    """A command that makes or changes namespaces failed."""


@functools.cache
def why_not() -> str | None:
    """Why no machines can be made here, or None if they can. Tests skip with it."""
    if not sys.platform.startswith("linux"):
        return "machines are Linux namespaces; this is not Linux"
    if os.geteuid() != 0:
        return "machines need root: they are network namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"machines need {', '.join(missing)}: install iproute2 and util-linux"
    try:
        command(["unshare", *KINDS, "--fork", "--mount-proc", "true"])
    except NamespaceError as error:
        return f"this system allows no new namespaces: {error}"
    return None


def command(arguments: Sequence[str]) -> str:
    """Run a short command and return what it printed.

    Raises:
        NamespaceError: it failed or took longer than COMMAND_S; with what it said.
    """
    try:
        done = subprocess.run(  # noqa: S603 Composed here and in `network`.
            arguments, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NamespaceError(f"{' '.join(arguments)}: not done after {COMMAND_S:g} s") from error
    if done.returncode:
        raise NamespaceError(f"{' '.join(arguments)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


class Holder:
    """A process that keeps namespaces open; `pid` is its number on the host.

    It ends when its standard input does: on `close`, and when the owner exits, also by SIGKILL.
    """

    def __init__(self, kinds: Sequence[str], *, setup: str = "", on_end: str = "") -> None:
        """Start it.

        Args:
            kinds: options of unshare, of KINDS.
            setup, on_end: shell commands in the namespaces, before it is ready and after it was asked to end.
        """
        wait = (
            f"cat > /dev/null\n{on_end}" if on_end else f"exec {shlex.join([sys.executable, '-S', '-E', '-c', _REAP])}"
        )
        script = f"trap '' INT TERM HUP\nset -e\n{setup}\necho ready\n{wait}"
        with_pids = ["--mount-proc"] if "--pid" in kinds else []
        self._process = subprocess.Popen(  # noqa: S603 A script of this package.
            ["unshare", *kinds, *with_pids, "--fork", "--kill-child", "sh", "-c", script],  # noqa: S607 As found on PATH, like the others.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the owner, which then closes it.
        )
        try:
            self._wait_until_ready()
            # Of its child alone: unshare --pid leaves its own process outside.
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            (self.pid,) = map(int, children)
        except BaseException:
            self.close()
            raise

    def enter(self, kinds: Sequence[str], arguments: Sequence[str]) -> list[str]:
        """The command that runs `arguments` in the holder's namespaces of these kinds."""
        return ["nsenter", f"--target={self.pid}", *kinds, "--", *arguments]

    def close(self) -> None:
        """End it, and all processes of its PID namespace. Waits until they are gone, at most COMMAND_S."""
        process = self._process
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            process.kill()  # --kill-child takes the rest along
            process.wait(COMMAND_S)

    def _wait_until_ready(self) -> None:
        stdout, stderr = self._process.stdout, self._process.stderr
        if stdout is None or stderr is None:
            raise AssertionError("the holder was started with pipes")
        readable, _, _ = select.select([stdout], [], [], COMMAND_S)
        if not readable or stdout.readline() != b"ready\n":
            self._process.kill()
            said = stderr.read().decode(errors="replace").strip()
            raise NamespaceError(f"cannot make namespaces: {said or f'not ready after {COMMAND_S:g} s'}")
