import json
import shutil
from pathlib import Path

import pytest

from dispatch.layout import LoadLayout
from tests.workers.record.test_run_log import disk_that_takes
from workers.record.record_check import find_holes
from workers.record.run_log import RunLog

LAYOUT = LoadLayout(("layers.1.moe",), (2,), (True,))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 to 4, with two samples after each second one."""
    with RunLog(tmp_path, LAYOUT, has_samples=True) as log:
        for step in range(1, 5):
            log.load(step, [step, step], [0, 0])
            log.train({"step": step})
            if step % 2 == 0:
                log.samples(step, [{"sample": 0, "tokens": ["a", "\n"]}, {"sample": 1, "tokens": []}])
    return tmp_path


def lines(run: Path, name: str = "samples.jsonl") -> list[str]:
    return (run / name).read_text().splitlines(keepends=True)


def test_resuming_moves_later_samples_and_what_is_damaged_aside(run: Path) -> None:
    before = lines(run)
    text = "".join([*before[:1], "{oops\n", *before[1:], '{"step": 4, "sam'])
    for _ in range(2):
        (run / "samples.jsonl").write_text(text)
        with RunLog(run, LAYOUT, 3, has_samples=True):
            assert lines(run) == before[:2]
    once = ["{oops\n", *before[2:], '{"step": 4, "sam\n']
    assert lines(run, "samples.superseded.jsonl") == once * 2


def test_a_run_that_samples_no_longer_keeps_what_it_has(run: Path) -> None:
    with RunLog(run, LAYOUT, 2) as log:
        log.samples(2, [])
    assert [json.loads(line)["step"] for line in lines(run)] == [2, 2]


@pytest.mark.parametrize("bad", ["{oops\n", '{"step": 2}\n', '{"step": true, "sample": 0}\n', "[]\n"])
def test_a_damaged_sample_before_the_step_is_a_hole(run: Path, bad: str) -> None:
    assert find_holes(run, 4) == []
    before = lines(run)
    (run / "samples.jsonl").write_text("".join([*before[:1], bad, *before[1:]]))
    assert [str(hole) for hole in find_holes(run, 4)] == ["samples.jsonl: line 2 is damaged"]
    (run / "samples.jsonl").write_text("".join([*before, bad]))
    assert find_holes(run, 4) == []  # behind it: it moves aside
    (run / "samples.jsonl").unlink()
    assert find_holes(run, 4) == []


def test_a_full_disk_delays_samples_and_a_crash_meanwhile_leaves_no_torn_line(tmp_path: Path) -> None:
    samples, heard = [{"sample": number, "tokens": ["long" * 9]} for number in range(2)], list[str]()
    with RunLog(tmp_path / "run", LAYOUT, has_samples=True, on_warning=heard.append) as log:
        with disk_that_takes(500):
            for step in range(4):
                log.samples(step, samples)
            crashed = shutil.copytree(tmp_path / "run", tmp_path / "crashed")
        log.event("checkpoint")
    assert [json.loads(line)["step"] for line in lines(tmp_path / "run")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(heard) == 2 and "samples.jsonl" in heard[0] and "complete" in heard[1]
    torn = lines(crashed)
    assert not torn[-1].endswith("\n")
    with RunLog(crashed, LAYOUT, 9, has_samples=True) as log:
        log.samples(9, samples)
    assert lines(crashed)[:-2] == torn[:-1]
    assert lines(crashed, "samples.superseded.jsonl") == [torn[-1] + "\n"]
