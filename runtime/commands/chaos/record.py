"""Reads everything that a run has recorded on disk: lines, loads and statistics, superseded ones included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dispatch.errors import InvalidValue
from workers.record.record_file import list_records
from workers.record.record_lines import Line, complete_lines
from workers.record.run_log import HISTORY, METRICS, read_load_history
from workers.record.sample_log import SAMPLES
from workers.record.statistic_log import STATISTICS

Stored = list[tuple[int, bytes]]  # step and all bytes of each record, in the order of the file


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run recorded.

    superseded_*: records of steps that were repeated from a checkpoint, as the first pass wrote them. damage: one
    sentence for each unreadable line.
    """

    lines: list[Line]
    superseded_lines: list[Line]
    samples: list[Line]
    superseded_samples: list[Line]
    loads: Stored
    superseded_loads: Stored
    statistics: Stored
    superseded_statistics: Stored
    damage: list[str]

    @property
    def num_stored(self) -> int:
        """Records of load and statistics, all of them."""
        return sum(map(len, (self.loads, self.superseded_loads, self.statistics, self.superseded_statistics)))


def read_record(run: Path) -> Record:
    """Read the record, also while the run goes on: then lines may lack the last load, and loads the last statistic."""
    damage: list[str] = []
    lines = read_lines(run / METRICS, damage)
    samples = read_lines(run / SAMPLES, damage, "sample")
    size = _load_bytes(run)
    return Record(
        lines=lines,
        superseded_lines=superseded_lines(run),
        samples=samples,
        superseded_samples=read_lines(run / "samples.superseded.jsonl", [], "sample"),
        loads=list(_loads(run / HISTORY, size)),
        superseded_loads=list(_loads(run / "load" / "history.superseded.bin", size)),
        statistics=list(_statistics(run / STATISTICS)),
        superseded_statistics=list(_statistics(run / "load" / "statistics.superseded.bin")),
        damage=damage,
    )


def superseded_lines(run: Path) -> list[Line]:
    """Lines of metrics.jsonl that were set aside because their steps were repeated. Torn ones are left out."""
    return read_lines(run / "metrics.superseded.jsonl", [])  # a crash may have torn any of them


def read_lines(path: Path, damage: list[str], kind: str | None = None) -> list[Line]:
    """Read the complete lines of a file, which need not exist. A damaged line adds a sentence to `damage` instead.

    kind: the "kind" of all lines, where the file does not store it.
    """
    lines = []
    for number, (_, line) in enumerate(complete_lines(path.read_bytes() if path.exists() else b""), 1):
        if line is None or "step" not in line or (kind is None and "kind" not in line):
            damage.append(f"{path.name}, line {number} is damaged")
        else:
            lines.append({"kind": kind, **line})
    return lines


def _load_bytes(run: Path) -> int:
    """Bytes of one record of history.bin; 0 where there is none yet."""
    try:
        # The step in 8 bytes, then an int64 count of each expert, then an fp32 bias of each.
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
