import json
from pathlib import Path

import numpy as np
import pytest

from dispatch.layout import LoadLayout
from workers.record.record_check import find_holes, new_holes, ranges
from workers.record.run_log import RunLog, read_events, read_load_history, read_metrics
from workers.record.statistic_log import StatisticHistory

LAYOUT = LoadLayout(("layers.1.moe",), (2,), (True,))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 to 8, evaluated at 0 and 4; the run would go on from 6."""
    with RunLog(tmp_path, LAYOUT, has_statistic=True) as log:
        log.eval({"step": 0})
        for step in range(1, 9):
            log.load(step, [step, step], [0, 0], np.array([step]))
            log.train({"step": step})
            if step == 4:
                log.eval({"step": 4})
    return tmp_path


def metrics(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def told(run: Path, step: int = 6) -> list[str]:
    return [str(hole) for hole in find_holes(run, step)]


def test_a_whole_record_has_no_hole_and_what_lies_behind_the_step_does_not_matter(run: Path) -> None:
    assert told(run) == told(run, 8) == []
    (run / "metrics.jsonl").write_text("".join(metrics(run)[:8]) + '{"torn\n{oops}')  # steps 7 and 8
    assert told(run) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: [*lines[:3], "{oops\n", *lines[4:]], "line 4 is damaged, step 3 is missing"),
        (lambda lines: [*lines[:3], lines[3].replace("3}", "99}"), *lines[4:]], "line 4 is damaged, step 3 is missing"),
        (lambda lines: [*lines[:3], lines[3].replace("3}", "2}"), *lines[4:]], "line 4 is damaged, step 3 is missing"),
        (lambda lines: lines[:3] + lines[5:], "step 3 to 4 is missing"),
        (lambda lines: lines[:3], "step 3 to 6 is missing"),
        (lambda lines: [*lines[:5], "\0" * 9 + "\n", *lines[6:]], "line 6 is damaged"),  # the evaluation
        (lambda lines: [*lines[:3], '{"kind": "train"}\n', *lines[4:]], "line 4 is damaged, step 3 is missing"),
    ],
)
def test_a_hole_in_the_metrics_names_lines_and_steps(run: Path, change, found: str) -> None:
    (run / "metrics.jsonl").write_text("".join(change(metrics(run))))
    assert told(run) == [f"metrics.jsonl: {found}"]


def test_holes_in_history_and_statistics_are_found(run: Path) -> None:
    for name in ("history.bin", "statistics.bin"):
        path = run / "load" / name
        size = path.stat().st_size // 8
        raw = path.read_bytes()
        path.write_bytes(raw[: 2 * size] + raw[4 * size :])
    assert told(run) == ["load/history.bin: step 3 to 4 is missing", "load/statistics.bin: step 3 to 4 is missing"]


def test_resuming_over_a_hole_keeps_every_good_line_and_is_told_once(run: Path) -> None:
    lines = metrics(run)
    (run / "metrics.jsonl").write_text("".join([*lines[:3], "{oops\n", *lines[4:]]))
    history = (run / "load/history.bin").read_bytes()
    record = len(history) // 8
    (run / "load/history.bin").write_bytes(history[:record] + history[2 * record :])
    holes = find_holes(run, 6)
    assert new_holes(run, holes) == holes
    with RunLog(run, LAYOUT, 6, has_statistic=True) as log:
        for hole in holes:
            log.event("record_hole", **hole.event())
    assert [line["step"] for line in read_metrics(run)[0]] == [1, 2, 4, 5, 6]
    assert [line["step"] for line in read_metrics(run)[1]] == [0, 4]
    assert read_load_history(run).steps.tolist() == [1, 3, 4, 5, 6]
    assert list(StatisticHistory(run)) == [1, 2, 3, 4, 5, 6]
    aside = (run / "metrics.superseded.jsonl").read_text().splitlines()
    assert aside[0] == "{oops" and [json.loads(line)["step"] for line in aside[1:]] == [7, 8]
    assert (run / "load/history.superseded.bin").read_bytes() == history[6 * record :]
    assert [(event["file"], event["steps"]) for event in read_events(run)] == [
        ("metrics.jsonl", "3"),
        ("load/history.bin", "2"),
    ]
    assert new_holes(run, find_holes(run, 6)) == []


def test_ranges_are_short() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == "1 to 3, 7, 9 to 10"
