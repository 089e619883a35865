"""now.json of a run: the present activity of each rank, for the live page. The driver has it, to find hangs."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatch.diagnosis.activity import Activity
from runtime.runs.run_dir import NOW_FILE

EVERY_S = 2.0


class NowFile:
    """Replaces the file, at most every EVERY_S. A failed write is ignored: nothing but the live page reads it."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._aside = run_dir / NOW_FILE, run_dir / f".{NOW_FILE}.partial"
        self._written_s = float("-inf")

    def write(self, seen: Mapping[int, tuple[Activity, float]]) -> None:
        """Write the activities. seen: by rank, the activity in its last answer, and that answer's age in seconds."""
        if not seen or time.monotonic() - self._written_s < EVERY_S:
            return
        self._written_s = time.monotonic()
        ranks = [_row(rank, *each) for rank, each in sorted(seen.items())]
        with contextlib.suppress(OSError):
            # Without fsync, which may take seconds while a checkpoint is written; the file is soon replaced anyway.
            self._aside.write_text(json.dumps({"time": time.time(), "ranks": ranks}) + "\n")
            self._aside.replace(self._path)


def _row(rank: int, activity: Activity, age_s: float) -> dict[str, Any]:
    wait = activity.waits_in
    return {
        "rank": rank,
        "step": activity.step,
        "phase": activity.phase,
        "layer": activity.layer,
        "for_s": round(activity.phase_s + age_s, 3),
        "waits_in": None if wait is None else str(wait),
        "waits_s": None if wait is None else round(wait.waited_s + age_s, 3),
        "memory_bytes": activity.memory_bytes,
        "age_s": round(age_s, 3),
    }
