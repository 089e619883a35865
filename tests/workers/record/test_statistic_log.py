import os
from pathlib import Path

import numpy as np
import pytest

from dispatch.layout import LoadLayout
from tests.workers.record.test_run_log import disk_that_takes
from workers.record.run_log import RunLog, read_load_history
from workers.record.statistic_log import STATISTICS, StatisticHistory, pack_statistic

LAYOUT = LoadLayout(("layers.1.moe",), (2,), (True,))
COUNTS = {1: [0, 7], 2: [0, 70_000], 3: [2**40, 0], 4: [0, 0]}  # of all three widths


def new_log(path: Path, **options) -> RunLog:
    return RunLog(path, LAYOUT, has_statistic=True, **options)


def write_steps(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.load(step, [1, 2], [0.0, 0.0], COUNTS[step])
        log.train({"step": step})


def read_all(path: Path) -> dict[int, list[int]]:
    return {step: counts.tolist() for step, counts in StatisticHistory(path).items()}


def test_every_count_comes_back_whatever_its_size(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2, 3, 4)
        assert read_all(tmp_path) == COUNTS  # while the run goes on


def test_a_run_without_a_statistic_has_no_such_file(tmp_path: Path) -> None:
    with RunLog(tmp_path, LAYOUT) as log:
        log.load(1, [1, 2], [0.0, 0.0])
    assert not (tmp_path / STATISTICS).exists()
    assert read_all(tmp_path) == {}


def test_a_histogram_of_mostly_zeros_is_small() -> None:
    counts = np.zeros(48_000, np.int64)
    counts[::40] = 5
    assert len(pack_statistic(1, counts)) < counts.size // 20


def test_a_record_torn_by_a_crash_is_left_out_and_gone_after_resuming(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2)
    whole = (tmp_path / STATISTICS).stat().st_size
    for lost in (3, len(pack_statistic(2, COUNTS[2])) - 4):  # in the content, in the header
        os.truncate(tmp_path / STATISTICS, whole - lost)
        assert read_all(tmp_path) == {1: COUNTS[1]}
    with new_log(tmp_path, resume_step=1) as log:
        write_steps(log, 2)
    assert read_all(tmp_path) == {step: COUNTS[step] for step in (1, 2)}


def test_resuming_moves_later_records_aside(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2, 3)
    before = (tmp_path / STATISTICS).read_bytes()
    with new_log(tmp_path, resume_step=1) as log:
        log.load(2, [1, 2], [0.0, 0.0], [5, 6])
    assert read_all(tmp_path) == {1: COUNTS[1], 2: [5, 6]}
    aside = (tmp_path / "load/statistics.superseded.bin").read_bytes()
    assert aside == pack_statistic(2, COUNTS[2]) + pack_statistic(3, COUNTS[3]) and before.endswith(aside)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2)
    raw = bytearray((tmp_path / STATISTICS).read_bytes())
    raw[-1] ^= 1
    (tmp_path / STATISTICS).write_bytes(raw)
    history = StatisticHistory(tmp_path)
    assert history[1].tolist() == COUNTS[1]
    with pytest.raises(ValueError, match=r"statistics\.bin is damaged at byte \d+, in the record of step 2"):
        history[2]


def test_a_full_disk_delays_a_statistic_and_loses_none(tmp_path: Path) -> None:
    with new_log(tmp_path, on_warning=lambda _: None) as log:
        with disk_that_takes(40):
            write_steps(log, 1, 2, 3)
            assert len(read_all(tmp_path)) < 3
        log.event("checkpoint")
        assert read_all(tmp_path) == {step: COUNTS[step] for step in (1, 2, 3)}
    assert read_load_history(tmp_path).steps.tolist() == [1, 2, 3]
