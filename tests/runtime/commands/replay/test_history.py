"""A real run's bias follows from its own record, bit for bit: with every kind of law, over resumptions and skips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dispatch.laws import BalanceConfig
from runtime.commands.replay.history import reproduce_bias
from tests.ranks import run_ranks
from tests.workers.training_gang import InfiniteGradient, join_worker, make_spec
from workers.checkpoints.checkpoint_files import latest
from workers.record.run_log import HISTORY, read_events, read_load_history, read_metrics
from workers.record.statistic_log import STATISTICS

# As resumed, the rate is another one: each step must be computed with that of its own start.
LAWS = {
    "sign": (BalanceConfig(law="sign", rate=0.01), BalanceConfig(law="sign", rate=0.003)),
    "newton": (BalanceConfig(law="newton"), BalanceConfig(law="newton", rate=0.25)),
    "quantile": (BalanceConfig(law="quantile"), BalanceConfig(law="quantile", rate=0.5)),
    "smebu": (
        BalanceConfig(law="smebu", rate=0.01, schedule="cosine", horizon=12),
        BalanceConfig(law="smebu", rate=0.01, schedule="cosine", horizon=20),
    ),
    "adaptive": (BalanceConfig(law="adaptive"), BalanceConfig(law="adaptive", options={"least_gain": 0.2})),
    "warm": (BalanceConfig(law="warm", rate=0.01),) * 2,
    "multiplicative": (BalanceConfig(law="multiplicative", rate=0.01),) * 2,
}
SKIPPED_STEP, RESUMED_AFTER, LAST_STEP = 3, 6, 12


def _skip_step(worker, step: int) -> None:
    forwards = []

    def poison(_module, _inputs, output):
        forwards.append(1)
        return InfiniteGradient.apply(output) if len(forwards) == step else None

    worker._state.model.norm.register_forward_hook(poison)


def _train_twice(rank, world_size, spec):
    """Each law: 9 steps with one skipped, then back to the checkpoint of step 6 and on with another rate."""
    for law, (first, second) in LAWS.items():
        started = replace(spec, run_dir=spec.run_dir.parent / law, balance=first, run=replace(spec.run, steps=9))
        worker = join_worker(started, rank, world_size, law)
        _skip_step(worker, SKIPPED_STEP)
        worker.train()
        resumed = replace(started, balance=second, run=replace(spec.run, steps=LAST_STEP))
        worker = join_worker(resumed, rank, world_size, f"{law}-resumed")
        worker.train(started.run_dir / "checkpoints" / f"step_{RESUMED_AFTER:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, _train_twice, make_spec(folder, checkpoint_every=3, keep_checkpoints=9))
    return folder


@pytest.mark.parametrize("law", LAWS)
def test_the_bias_of_every_step_follows_from_the_counts(runs: Path, law: str) -> None:
    assert latest(runs / law / "checkpoints") is not None
    lines, _ = read_metrics(runs / law)
    assert [line["step"] for line in lines if line["skipped"]] == [SKIPPED_STEP]
    assert read_load_history(runs / law).bias[-1].any()
    found = reproduce_bias(runs / law)
    assert (found.num_steps, found.num_equal, found.problem) == (LAST_STEP, LAST_STEP, None)
    assert str(found) == "the run's own bias: 12 of 12 steps reproduced bit for bit"


def test_events_tell_the_law_of_every_start(runs: Path) -> None:
    starts = [event for event in read_events(runs / "smebu") if event["event"] in ("started", "resumed")]
    assert [(start["step"], start["balance"]["horizon"]) for start in starts] == [(0, 12), (6, 20)]


def _copy(run: Path, target: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            (target / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(run)).write_bytes(path.read_bytes())
    return target


def test_one_changed_bit_is_found_with_its_step(runs: Path, tmp_path: Path) -> None:
    run = _copy(runs / "sign", tmp_path / "run")
    records = np.fromfile(run / HISTORY, [("step", "<i8"), ("counts", "<i8", 16), ("bias", "<u4", 16)])
    records["bias"][7, 3] ^= 1
    records.tofile(run / HISTORY)
    found = reproduce_bias(run)
    assert not found.is_exact
    assert str(found).endswith("7 of 12 steps reproduced bit for bit; step 8 was routed by another bias")


@pytest.mark.parametrize(("old", "new"), [('"skipped": true', '"skipped": false'), ('"rate": 0.003', '"rate": 0.004')])
def test_a_wrong_record_of_what_was_applied_is_found(runs: Path, tmp_path: Path, old: str, new: str) -> None:
    run = _copy(runs / "sign", tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).write_text((run / name).read_text().replace(old, new))
    step = SKIPPED_STEP + 1 if "skipped" in old else RESUMED_AFTER + 2
    assert f"step {step} was routed by another bias" in str(reproduce_bias(run))


def test_missing_records_end_the_check_with_their_name(runs: Path, tmp_path: Path) -> None:
    run = _copy(runs / "newton", tmp_path / "run")
    (run / STATISTICS).write_bytes(b"")
    assert "1 of 12 steps" in str(reproduce_bias(run)) and "no record of step 1" in str(reproduce_bias(run))
    records = (run / HISTORY).read_bytes()
    (run / HISTORY).write_bytes(records[8 + 12 * 16 :])
    assert reproduce_bias(run).problem == "the record of step 1 is missing"
