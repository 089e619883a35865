"""The verdict sees every kind of damage to a record, planted in that of a run which is otherwise the calm one's."""

import json
import shutil
from pathlib import Path

import pytest

from dispatch.layout import LoadLayout
from runtime.commands.chaos.record import read_record
from runtime.commands.chaos.sameness import differences, flaws
from runtime.report.run_record import ASSIGNMENT_FIELDS
from workers.record.run_log import RunLog

LAYOUT = LoadLayout(("layers.1.moe",), (4,), (True,))
STEPS, ASSIGNMENTS = 6, 10
HISTORY, STATISTICS = "load/history.bin", "load/statistics.bin"
RECORD_BYTES = 8 + 12 * 4


def write(path: Path, first: int = 1, last: int = STEPS, resume: int | None = None) -> Path:
    with RunLog(path, LAYOUT, resume, has_statistic=True, has_samples=True) as log:
        if resume is None:
            log.eval({"step": 0, "val_loss": 6.0})
            log.samples(0, samples(0))
        for step in range(first, last + 1):
            log.train({"step": step, "loss": 1 / step, "step_s": 0.1, **dict.fromkeys(ASSIGNMENT_FIELDS, ASSIGNMENTS)})
            log.load(step, [step, 3, 7 - step, 0], [0.5 / step, 0, 0, 0], [[step, 1]])
            if step % 2 == 0:
                log.eval({"step": step, "val_loss": 5 / step})
                log.samples(step, samples(step))
    return path


def samples(step: int) -> list[dict[str, object]]:
    return [{"sample": number, "tokens": ["a", f"{step}{number}"]} for number in range(2)]


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    return write(tmp_path / "calm")


@pytest.fixture
def struck(tmp_path: Path) -> Path:
    """Made 1 to 5, was killed, and went on from step 2."""
    run = write(tmp_path / "struck", last=5)
    return write(run, first=3, resume=2)


def found(struck: Path, calm: Path, *, ended: bool = True) -> dict[str, str]:
    return flaws(read_record(struck), read_record(calm), ASSIGNMENTS, ended=ended)


def change(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def line(run: Path, kind: str, step: int) -> bytes:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return next(raw for raw in lines if (json.loads(raw)["kind"], json.loads(raw)["step"]) == (kind, step))


def test_a_run_that_went_back_and_made_the_same_has_no_flaw(struck, calm):
    record = read_record(struck)
    assert found(struck, calm) == {}
    assert [each["step"] for each in record.superseded_lines if each["kind"] == "train"] == [3, 4, 5]
    assert record.num_stored == 2 * (STEPS + 3)


@pytest.mark.parametrize("name", [HISTORY, STATISTICS, "load/history.superseded.bin", "load/statistics.superseded.bin"])
def test_a_bit_that_differs_in_a_load_or_a_statistic_is_seen(struck, calm, name):
    raw = bytearray((struck / name).read_bytes())
    raw[-1] ^= 1
    (struck / name).write_bytes(raw)
    last = 5 if "superseded" in name else 6
    file = name.removeprefix("load/").replace(".superseded", "")
    assert found(struck, calm) == {f"{file}, step {last}": "the record is not that of the calm run"}


@pytest.mark.parametrize("ended", [False, True])
def test_a_line_that_is_there_twice_or_missing_is_seen_at_any_time(struck, calm, ended):
    third, path = line(struck, "train", 3), struck / "metrics.jsonl"
    change(path, third, third + third)
    assert found(struck, calm, ended=ended) == {
        "order of metrics.jsonl": "train 3 is at place 6, where train 4 belongs"
    }
    change(path, third + third, b"")
    assert found(struck, calm, ended=ended) == {
        "order of metrics.jsonl": "train 4 is at place 5, where train 3 belongs"
    }
    change(path, line(struck, "train", 4), b'{"kind": "tr\n')
    assert found(struck, calm, ended=ended)["metrics.jsonl, line 5 is damaged"]


def sample_lines(run: Path) -> list[bytes]:
    return (run / "samples.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("ended", [False, True])
def test_a_sample_that_differs_is_missing_or_there_twice_is_seen_at_any_time(struck, calm, ended):
    path, lines = struck / "samples.jsonl", sample_lines(struck)  # two each of the steps 0, 2, 4 and 6
    path.write_bytes(b"".join([*lines[:3], *lines[2:]]))
    twice = "sample 0 of step 2 is at place 4, where sample 1 of step 2 belongs"
    assert found(struck, calm, ended=ended) == {"order of samples.jsonl": twice}
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    lost = "sample 0 of step 4 is at place 4, where sample 1 of step 2 belongs"
    assert found(struck, calm, ended=ended) == {"order of samples.jsonl": lost}
    path.write_bytes(b"".join(lines[:4]))
    behind = {"order of samples.jsonl": "sample 0 of step 4 is missing, and what follows it"}
    assert found(struck, calm, ended=ended) == behind
    path.write_bytes(b"".join(lines).replace(b'"41"', b'"42"'))
    assert found(struck, calm, ended=ended) == {
        "samples after step 4": "tokens is ['a', '42'], in the calm run ['a', '41']"
    }
    path.write_bytes(b"".join([*lines[:2], b"{oops\n", *lines[2:]]))
    assert found(struck, calm, ended=ended) == {"samples.jsonl, line 3 is damaged": "it was whole when it was written"}


def test_a_sample_that_was_made_anew_and_differs_is_seen(struck, calm):
    change(struck / "samples.superseded.jsonl", b'"40"', b'"50"')
    assert found(struck, calm) == {"samples after step 4": "tokens is ['a', '50'], in the calm run ['a', '40']"}


@pytest.mark.parametrize("ended", [False, True])
def test_an_evaluation_that_is_missing_is_seen_at_any_time(struck, calm, ended):
    change(struck / "metrics.jsonl", line(struck, "eval", 4), b"")
    assert found(struck, calm, ended=ended) == {"order of metrics.jsonl": "train 5 is at place 7, where eval 4 belongs"}


@pytest.mark.parametrize("ended", [False, True])
def test_a_record_of_a_load_that_is_missing_or_there_twice_is_seen_at_any_time(struck, calm, ended):
    path = struck / HISTORY
    raw = path.read_bytes()
    path.write_bytes(raw[:RECORD_BYTES] + raw[2 * RECORD_BYTES :])
    assert found(struck, calm, ended=ended) == {"order of history.bin": "step 3 is at place 2, where step 2 belongs"}
    path.write_bytes(raw[:RECORD_BYTES] + raw)
    assert found(struck, calm, ended=ended) == {"order of history.bin": "step 1 is at place 2, where step 2 belongs"}
    path.write_bytes(raw[: 3 * RECORD_BYTES])
    assert found(struck, calm, ended=ended) == {"order of history.bin": "step 4 is missing, and what follows it"}


def test_a_run_may_be_behind_by_what_it_is_writing_until_it_is_over(struck, calm):
    change(struck / "metrics.jsonl", line(struck, "eval", 6), b"")
    (struck / "samples.jsonl").write_bytes(b"".join(sample_lines(struck)[:5]))  # the first of step 4
    for name in (HISTORY, STATISTICS):
        raw = (struck / name).read_bytes()
        (struck / name).write_bytes(raw[: raw.rindex(STEPS.to_bytes(8, "little"))])
    assert found(struck, calm, ended=False) == {}
    assert found(struck, calm) == {
        "order of metrics.jsonl": "eval 6 is missing, and what follows it",
        "order of samples.jsonl": "sample 1 of step 4 is missing, and what follows it",
        "order of history.bin": "step 6 is missing, and what follows it",
        "order of statistics.bin": "step 6 is missing, and what follows it",
    }


def test_a_statistic_that_was_never_recorded_is_seen(struck, calm):
    (struck / STATISTICS).unlink()
    assert found(struck, calm, ended=False) == {"order of statistics.bin": "step 1 is missing, and what follows it"}


def test_lost_tokens_are_seen_though_both_runs_lose_them(calm, tmp_path):
    change(calm / "metrics.jsonl", (lost := line(calm, "train", 2)), lost.replace(b'received": 10', b'received": 9'))
    assert found(shutil.copytree(calm, tmp_path / "same"), calm) == {
        "step 2": "tokens_received is 9, and the batch has 10"
    }
    for name in ASSIGNMENT_FIELDS:  # equal among themselves, and too few
        change(
            calm / "metrics.jsonl",
            (lost := line(calm, "train", 5)),
            lost.replace(f'{name}": 10'.encode(), f'{name}": 8'.encode()),
        )
    raw = (calm / HISTORY).read_bytes()
    (calm / HISTORY).write_bytes(raw[:8] + b"\0" + raw[9:])
    assert found(shutil.copytree(calm, tmp_path / "same too"), calm) == {
        "step 2": "tokens_received is 9, and the batch has 10",
        "step 5": "tokens_routed is 8, and the batch has 10",
        "history.bin, step 1": "it counts 9, and the batch has 10",
    }


def test_lines_are_the_same_but_for_times():
    calm = [{"step": 1, "loss": 0.5, "time": 1.0, "step_s": 0.1}, {"step": 2, "loss": 0.25, "bias_checksum": "ab"}]
    assert differences([{"step": 1, "loss": 0.5, "time": 9.0, "step_s": 7.0}, calm[1]], calm) == {}
    changed = [{**calm[0], "loss": 0.5000000000000001}, {**calm[1], "bias_checksum": "ac"}, {"step": 3}]
    assert differences(changed, calm) == {
        1: "loss is 0.5000000000000001, in the calm run 0.5",
        2: "bias_checksum is ac, in the calm run ab",
        3: "the calm run has no such step",
    }
    assert differences([{"step": 2, "loss": 0.25}], calm) == {2: "bias_checksum is None, in the calm run ab"}
