import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.report import held
from runtime.report.held import held_json
from runtime.report.run_record import RunRecord
from tests.synthetic_run import SyntheticRun, add_metric, make_run
from workers.record.run_log import read_load_history, read_metrics


def held_of(run: Path) -> dict:
    return json.loads(held_json(RunRecord.read(run)))


def test_a_short_run_is_held_step_by_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=60, skipped_steps=(4,)))
    add_metric(run, "of_the_user", 2.5)
    all_held, (train, evals) = held_of(run), read_metrics(run)
    found = all_held["curves"]
    assert found["first"] == found["last"] == list(range(61))  # step 0 was evaluated
    for name in ("loss", "grad_norm", "max_vio_floor"):
        values = [None, *(line[name] for line in train)]
        assert found["curves"][name].keys() == {"mean"}
        means = np.array(found["curves"][name]["mean"], float)  # None is NaN
        np.testing.assert_allclose(means, np.array(values, float), rtol=1e-6)
    assert found["curves"]["max_vio_batch_per_layer.2"]["mean"][7] == pytest.approx(
        train[6]["max_vio_batch_per_layer"][2], rel=1e-6
    )
    assert all_held["facts"]["own_metrics"] == ["of_the_user"]
    assert found["curves"]["of_the_user"]["mean"] == [None] + [2.5] * 60
    assert found["curves"]["val_loss"]["mean"][20] == pytest.approx(evals[1]["val_loss"])


def test_load_and_bias_of_a_layer_are_those_that_were_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=20, num_layers=2, num_experts=4))
    layer, history = held_of(run)["layers"][1], read_load_history(run)
    counts, bias = history.counts[:, 4:], history.bias[:, 4:]

    def halves(text: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), "<f2").reshape(20, 4)

    assert layer["steps"] == list(range(1, 21))
    np.testing.assert_allclose(halves(layer["share"]), counts / counts.mean(1, keepdims=True), rtol=1e-3)
    np.testing.assert_allclose(halves(layer["bias"]), bias, rtol=1e-3, atol=1e-6)
    assert len(base64.b64decode(layer["codes"])) == 20 * 4


def test_a_longer_run_is_not_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MAX_SPANS", 40)
    monkeypatch.setattr(held, "MAX_COLUMNS", 20)
    monkeypatch.setattr(held, "MAX_OWN_POINTS", 10)
    made = SyntheticRun(steps=200, eval_every=4)
    short, long = (
        held_json(RunRecord.read(make_run(tmp_path / f"{steps}", replace(made, steps=steps, total_steps=steps))))
        for steps in (200, 1000)
    )
    assert len(long) < 1.2 * len(short)  # five times as long; numbers of steps have more digits


def test_more_layers_have_coarser_maps_until_they_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 8 experts each: 2 layers of 20 columns or 5 of 8 fit; a sixth would leave fewer than 7.
    monkeypatch.setattr(held, "MAX_CELLS", 320)
    monkeypatch.setattr(held, "MIN_COLUMNS", 7)
    sizes = {}
    for num in (2, 5, 8):
        found = held_of(make_run(tmp_path / f"{num}", SyntheticRun(steps=40, num_layers=num)))
        sizes[num] = [len(each["steps"]) for each in found["layers"]]
        assert len(found["facts"]["layers"]) == len(found["layers"]) == len(found["last_load"]["layers"])
    assert sizes == {2: [20] * 2, 5: [8] * 5, 8: [8] * 5}


def test_more_curves_have_fewer_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MAX_NUMBERS", 3000)
    curves = held_of(make_run(tmp_path / "run", SyntheticRun(steps=100)))["curves"]
    assert 3 * len(curves["first"]) * len(curves["curves"]) <= 3000 and len(curves["first"]) > 20


def test_no_text_of_a_run_ends_the_element_that_holds_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=5))
    layout = json.loads((run / "load/layout.json").read_text()) | {"names": ["</script><b>", "<!--", "x" * 999]}
    (run / "load/layout.json").write_text(json.dumps(layout))
    text = held_json(RunRecord.read(run))
    assert "<" not in text
    assert json.loads(text)["facts"]["layers"] == ["</script><b>", "<!--", "x" * 200]
