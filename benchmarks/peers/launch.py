"""Starts the ranks of a race as fresh processes, since glibc and oneDNN read their settings when a process starts."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.case import Case
from benchmarks.peers.machine import environment_of_ranks

END_LIMIT_S = 60.0  # from the result to the end of all ranks
LOG_LINES = 12


class RaceFailed(Exception):
    """A rank died; the message has the last lines of every rank's output."""


def race(case: Case, names: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run one race in `case.ep_size` processes and return what rank 0 measured, as plain values.

    Raises:
        RaceFailed: no result came. A rank that dies takes the others with it, since gloo sees its connections close.
    """
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        ranks = [_start(case, names, rank, Path(folder)) for rank in range(case.ep_size)]
        try:
            result = _listen(ranks[0], say)
            codes = [process.wait(END_LIMIT_S if result else None) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if result is None:
            raise RaceFailed(_failure_text(codes, Path(folder)))
    return result


def _start(case: Case, names: list[str], rank: int, folder: Path) -> subprocess.Popen[str]:
    job = json.dumps({"case": asdict(case), "names": names, "rank": rank, "store": str(folder / "store")})
    with _log(folder, rank).open("w") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "benchmarks.peers.worker", job],
            env=environment_of_ranks(case.allocator, case.threads),
            stdout=subprocess.PIPE if rank == 0 else log,
            stderr=log,
            text=True,
        )


def _listen(first_rank: subprocess.Popen[str], say: Callable[[str], None]) -> dict[str, Any] | None:
    """Pass on the messages of rank 0 until it closes its output; returns the result, if there was one."""
    result = None
    for line in first_rank.stdout or ():
        message = json.loads(line)
        if "say" in message:
            say(message["say"])
        result = message.get("result", result)
    return result


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _failure_text(codes: list[int], folder: Path) -> str:
    parts = []
    for rank, code in enumerate(codes):
        tail = _log(folder, rank).read_text(errors="replace").splitlines()[-LOG_LINES:]
        parts.append("\n".join([f"rank {rank} ended with exit code {code}:", *tail]))
    return "\n".join(parts)
