"""The texts that a run continues at its evaluations: samples.jsonl. Format: docs/run-directory.md. Needs no torch."""

from pathlib import Path

from workers.record.append_file import keep_lines
from workers.record.record_lines import MAX_STEP, Line, complete_lines

SAMPLES = "samples.jsonl"


def is_sample(line: Line) -> bool:
    """Whether a line of samples.jsonl has a valid step and the index of its prompt, `sample`."""
    step, sample = line.get("step"), line.get("sample")
    return type(step) is int and 0 <= step <= MAX_STEP and type(sample) is int and sample >= 0


def damaged_samples(run: Path, step: int) -> tuple[int, ...]:
    """Numbers of the damaged lines before the last line that a run which resumes from `step` keeps."""
    path = run / SAMPLES
    return tuple(_sort_lines(path.read_bytes(), step)[1]) if path.exists() else ()


def cut_back_samples(run: Path, step: int) -> None:
    """Keep the lines up to `step` and move all others aside; does nothing if the run has none."""
    path = run / SAMPLES
    if path.exists():
        raw = path.read_bytes()
        keep_lines(path, raw, _sort_lines(raw, step)[0])


def _sort_lines(raw: bytes, step: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Where the lines up to `step` start and stop, and the numbers of the damaged lines among them."""
    kept: list[tuple[int, int]] = []
    damaged: list[int] = []
    last_kept = 0
    for number, (offset, line) in enumerate(complete_lines(raw), 1):
        if line is None or not is_sample(line):
            damaged.append(number)
        elif line["step"] <= step:
            kept.append((offset, raw.index(b"\n", offset) + 1))
            last_kept = number
    return kept, [number for number in damaged if number < last_kept]
