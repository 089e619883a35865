"""now.json of a run: what each rank is in at this moment, for the live page. The driver asks the ranks anyway."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dispatch.diagnosis.activity import Activity

NOW = "now.json"
EVERY_S = 2.0


class NowFile:
    """Replaces the file at most every EVERY_S. It is for eyes: a disk that does not take it is not told of."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._aside = run_dir / NOW, run_dir / f".{NOW}.partial"
        self._written_s = float("-inf")

    def write(self, seen: Mapping[int, tuple[Activity, float]]) -> None:
        """Write what each rank was seen in. seen: by rank, with the seconds since it answered."""
        if not seen or time.monotonic() - self._written_s < EVERY_S:
            return
        self._written_s = time.monotonic()
        ranks = [_row(rank, *each) for rank, each in sorted(seen.items())]
        with contextlib.suppress(OSError):
            # Not forced to the disk: that may take seconds while a checkpoint is written, and the next one is near.
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
