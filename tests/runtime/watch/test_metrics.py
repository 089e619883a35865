import json
import math
from pathlib import Path

import numpy as np
import pytest

from runtime.watch import metrics as module
from runtime.watch import tail
from runtime.watch.curves import REST, pace_s
from runtime.watch.metrics import Metrics
from runtime.watch.tail import Rewritten
from tests.runtime.watch.test_buckets import slow_span
from tests.synthetic_run import PHASES_S, SyntheticRun, make_run
from workers.record.run_log import read_metrics

NAMES = ["loss", "val_loss", "max_vio_batch_per_layer.2", REST, "of nobody"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("metrics") / "run", SyntheticRun(steps=300, total_steps=300))


def points_of(run: Path) -> list[tuple[int, list[float]]]:
    """Every line with the values of NAMES, by the reader of reports."""
    train, evals = read_metrics(run)

    def row(line: dict) -> list[float]:
        layers = line.get("max_vio_batch_per_layer", [math.nan] * 3)
        rest = line["step_s"] - sum(line[name] for name in PHASES_S) if "step_s" in line else math.nan
        return [line.get("loss", math.nan), line.get("val_loss", math.nan), layers[2], rest, math.nan]

    return [(line["step"], row(line)) for line in train + evals]


def read_all(path: Path) -> Metrics:
    reader = Metrics(path)
    while reader.poll():
        pass
    return reader


def check(reader: Metrics, run: Path, first: int, last: int, num: int) -> None:
    points, spans = points_of(run), reader.spans(NAMES, first, last, num)
    assert spans.first.size
    for n, (start, stop) in enumerate(zip(spans.first.tolist(), spans.last.tolist(), strict=True)):
        for curve in range(len(NAMES)):
            found = spans.low[n, curve], spans.high[n, curve], spans.mean[n, curve]
            assert found == pytest.approx(slow_span(points, start, stop, curve), nan_ok=True, rel=1e-6)


@pytest.mark.parametrize("chunk", [500, 5_000, 2**20])
def test_curves_are_those_of_the_lines_however_the_file_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", chunk)
    reader = read_all(run / "metrics.jsonl")
    assert reader.share_read == 1
    for first, last, num in ((0, 300, 400), (0, 300, 10), (100, 120, 400), (290, 10_000, 3)):
        check(reader, run, first, last, num)
    assert (reader.last_step, reader.latest["step"]) == (300, 300)
    assert [line["step"] for line in reader.recent][-60:] == list(range(241, 301))
    assert (reader.first_eval["step"], reader.last_eval["step"]) == (0, 300)


def test_a_window_of_few_steps_is_read_line_by_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_all(run / "metrics.jsonl").spans(["loss"], 100, 130, 400)
    monkeypatch.setattr(module, "Buckets", lambda num: module_buckets(num, max_buckets=16))
    monkeypatch.setattr(module, "INDEX_EVERY", 16)
    reader = read_all(run / "metrics.jsonl")
    exact = reader.spans(["loss"], 100, 130, 400)
    assert exact.first.tolist() == exact.last.tolist() == list(range(100, 131))
    assert exact.mean.ravel() == pytest.approx(whole.mean.ravel())
    for first, last in ((0, 30), (280, 300), (37, 37)):
        check(reader, run, first, last, 400)
    monkeypatch.setattr(module, "EXACT_STEPS", 20)
    assert len(reader.spans(["loss"], 100, 130, 400).first) <= 3
    check(reader, run, 100, 130, 400)


module_buckets = module.Buckets


def test_a_long_file_is_drawn_from_samples_until_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", 5_000)
    monkeypatch.setattr(module, "NUM_SPREAD", 60)
    reader = Metrics(run / "metrics.jsonl")
    reader.poll()
    assert reader.share_read < 0.2
    assert reader.last_step == 300  # what the run does now is known at once
    recent = [line["step"] for line in reader.recent]
    assert recent[-50:] == list(range(251, 301))
    losses = {line["step"]: line["loss"] for line in read_metrics(run)[0]}
    spans = reader.spans(["loss"], 0, 300, 400)
    assert spans.first.tolist() == sorted(set(spans.first.tolist()))
    assert spans.last[-1] == 300
    assert np.diff(spans.first).max() < 12
    for step, value in zip(spans.first.tolist(), spans.mean[:, 0].tolist(), strict=True):
        assert math.isnan(value) or value == pytest.approx(losses[step], rel=1e-6)
    while reader.poll():
        pass
    assert len(reader.spans(["loss"], 0, 300, 400).first) == 300


def test_a_run_that_resumes_from_an_earlier_step_is_noticed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    reader = read_all(run / "metrics.jsonl")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:30]) + lines[31])
    with pytest.raises(Rewritten):
        reader.poll()


def test_damaged_and_hostile_lines_are_passed_over(tmp_path: Path) -> None:
    good = {"kind": "train", "step": 1, "time": 1.0, "loss": 2.0}
    odd = [
        {**good, "step": 2, "loss": "<script>"},
        {**good, "step": 3, "loss": 1e308, "lr": True, "max_vio_batch_per_layer": "abc"},
        {**good, "step": 4, "loss": 10**400, "max_vio_batch_per_layer": [None, "x", 1.5] * 1000},
        {**good, "step": 2, "loss": None, "a,b": 1.0, "max_vio_batch_per_layer.x": 1.0, "x" * 64: 1.0},
        {**good, "step": 5, **{f"own_{number}": 1.0 for number in range(1000)}},
    ]
    bad = [b"{", b"[]", b"[" * 10_000, b"\xff\xfe", b'{"kind": "train", "step": -1, "time": 1}', b"null",
           b'{"kind": "train", "step": 7, "time": "now"}', b'{"kind": "train", "step": 1e9, "time": 1}']  # fmt: skip
    raw = b"\n".join([*bad, *(json.dumps(line).encode() for line in [good, *odd]), *bad, b""])
    (tmp_path / "metrics.jsonl").write_bytes(raw)
    reader = read_all(tmp_path / "metrics.jsonl")
    spans = reader.spans(["loss", "lr"], 0, 100, 100)
    assert spans.first.tolist() == [1, 5]
    assert reader.last_step == 5
    assert reader.own_metrics == tuple(f"own_{number}" for number in range(32))
    assert len(reader.names) < 700


def test_the_pace_is_that_of_the_steps_that_go_on() -> None:
    def line(step: int, time: float) -> dict:
        return {"step": step, "time": time}

    assert pace_s([line(1, 0)]) is None
    assert pace_s([line(1, 0), line(2, 2), line(3, 5)]) == 2.5
    assert pace_s([line(8, 0), line(9, 1), line(5, 40), line(6, 41)]) == 1.0  # a recovery between
