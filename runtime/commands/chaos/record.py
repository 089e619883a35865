"""Reads everything that a run has recorded on disk: lines, loads and statistics, repeated steps included."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from workers.record.record_file import list_records
from workers.record.run_log import HISTORY, METRICS, read_load_history
from workers.record.sample_log import SAMPLES
from workers.record.statistic_log import STATISTICS

Line = dict[str, Any]
Stored = list[tuple[int, bytes]]  # step and all bytes of each record, in the order of the file


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run recorded. made_anew: what was set aside when the run went back. damage: unreadable lines."""

    lines: list[Line]
    lines_made_anew: list[Line]
    samples: list[Line]
    samples_made_anew: list[Line]
    loads: Stored
    loads_made_anew: Stored
    statistics: Stored
    statistics_made_anew: Stored
    damage: list[str]

    @property
    def num_stored(self) -> int:
        """Records of load and statistics, all of them."""
        return sum(map(len, (self.loads, self.loads_made_anew, self.statistics, self.statistics_made_anew)))


def read_record(run: Path) -> Record:
    """Read it, also while the run goes on: then lines may be a step older than loads, and loads than statistics."""
    damage: list[str] = []
    lines = _lines(run / METRICS, damage)
    samples = _lines(run / SAMPLES, damage, "sample")
    size = _load_bytes(run)
    return Record(
        lines=lines,
        lines_made_anew=_lines(run / "metrics.superseded.jsonl", []),  # a crash may have torn any of these
        samples=samples,
        samples_made_anew=_lines(run / "samples.superseded.jsonl", [], "sample"),
        loads=list(_loads(run / HISTORY, size)),
        loads_made_anew=list(_loads(run / "load" / "history.superseded.bin", size)),
        statistics=list(_statistics(run / STATISTICS)),
        statistics_made_anew=list(_statistics(run / "load" / "statistics.superseded.bin")),
        damage=damage,
    )


def _lines(path: Path, damage: list[str], kind: str | None = None) -> list[Line]:
    """Of every complete line, of this kind if they name none; the number of one that is none goes into `damage`."""
    texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines.append({"kind": kind or line["kind"], "step": line["step"], **line})
        except (ValueError, KeyError, TypeError):
            damage.append(f"{path.name}, line {number} is damaged")
    return lines


def _load_bytes(run: Path) -> int:
    try:
        return 8 + 12 * read_load_history(run).layout.total
    except (InvalidValue, FileNotFoundError):  # it has just begun
        return 0


def _loads(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    raw = path.read_bytes() if size and path.exists() else b""
    for start in range(0, len(raw) - size + 1, size or 1):
        yield int.from_bytes(raw[start : start + 8], "little", signed=True), raw[start : start + size]


def _statistics(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.exists():
        return
    places, _ = list_records(path)
    raw = path.read_bytes()
    for place in places:
        yield place.step, raw[place.start : place.offset + place.num_bytes]
