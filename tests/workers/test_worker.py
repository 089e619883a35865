"""Whole small runs: parity over layouts, resuming, skipped steps, evaluation, generation. Few launches, many checks."""

import contextlib
from dataclasses import replace

import pytest
import torch

from dispatch.config import ScheduleConfig
from dispatch.laws import BalanceConfig, Law
from runtime.job.coordinator import CoordinatorPolicy
from tests.ranks import run_ranks
from tests.workers.training_gang import InfiniteGradient, assert_same_state, join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import CheckpointCorrupt, latest, read_manifest, write_manifest
from workers.distributed.parallel import ParallelConfig
from workers.generation.generate import SamplingConfig
from workers.record.run_log import read_events, read_load_history, read_metrics
from workers.training.evaluation import evaluate
from workers.worker import Worker


def _with_run(spec, name, **run):
    return replace(spec, run_dir=spec.run_dir.parent / name, run=replace(spec.run, **run))


def _train(spec, rank, world_size, *, resume=False, float64=False, stop_after=None):
    worker = join_worker(spec, rank, world_size, f"{spec.run_dir.name}{resume}", float64=float64, stop_after=stop_after)
    outcome = worker.train(latest(spec.run_dir / "checkpoints") if resume else None)
    return worker, outcome


# By number of ranks: sequences of a micro-batch (0: all), and how the ranks divide, send and order the work.
IN_CHUNKS, IN_ROUNDS = ScheduleConfig(num_chunks=2), ScheduleConfig(max_rows=20)  # of 96 rows on average
LAYOUTS = {
    1: [(0, {}), (3, {}), (0, {"schedule": IN_ROUNDS})],
    2: [(0, {}), (2, {}), (0, {"ep_size": 1})],
    3: [(0, {}), (2, {}), (0, {"schedule": IN_CHUNKS})],
    4: [
        (0, {}),
        (0, {"ep_size": 2}),
        (0, {"exchange": "node", "ranks_per_node": 2}),
        (0, {"exchange": "node", "ranks_per_node": 2, "schedule": IN_CHUNKS}),
        (0, {"exchange": "node", "ranks_per_node": 1, "ep_size": 2, "schedule": IN_ROUNDS}),
        (0, {"exchange": "assignment", "schedule": IN_ROUNDS}),
    ],
}


def _train_layouts(rank, world_size, spec):
    results = {}
    for index, (micro_batch_size, settings) in enumerate(LAYOUTS[world_size]):
        layout = replace(
            _with_run(spec, f"w{world_size}-{index}", micro_batch_size=micro_batch_size),
            parallel=ParallelConfig(**settings),
        )
        worker, _ = _train(layout, rank, world_size, float64=True)
        results[world_size, index] = (whole_state(worker), worker.progress(0))
    return results if rank == 0 else None


def test_any_layout_of_ranks_trains_the_same_model(tmp_path):  # P1, P5, P11, B4, B13
    spec = make_spec(tmp_path, steps=3)
    runs = {}
    for world_size in LAYOUTS:
        runs |= run_ranks(world_size, _train_layouts, spec)[0]
    one, one_lines = runs.pop((1, 0))
    assert len(runs) == 14
    for name, (state, lines) in runs.items():
        assert_same_state(state, one, name)
        for line, expected in zip(lines, one_lines, strict=True):
            if line.get("kind") == "train":
                assert line["loss"] == pytest.approx(expected["loss"], rel=1e-10)
                assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-10)
                assert line["bias_checksum"] == expected["bias_checksum"]


def _interrupt_and_resume(rank, world_size, spec):
    spec = replace(spec, model=replace(spec.model, recompute="full"))
    whole, _ = _train(_with_run(spec, "whole"), rank, world_size)
    expected = whole_state(whole)
    _, outcome = _train(_with_run(spec, "cut"), rank, world_size, stop_after=5)
    assert (outcome.step, outcome.completed) == (5, False)
    resumed, outcome = _train(_with_run(spec, "cut"), rank, world_size, resume=True)
    assert (outcome.step, outcome.completed) == (10, True)
    state = whole_state(resumed)
    assert state.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


def _resume_elsewhere(rank, world_size, spec):
    spec = replace(spec, model=replace(spec.model, recompute="full"))
    worker = join_worker(spec, rank, world_size, "elsewhere")
    run_dir = spec.run_dir.parent
    with worker._state.open_control() as control:
        from workers.training.training_run import TrainingRun

        run = TrainingRun(worker._state, control, publish=print, stop_requested=worker._stop_requested)
        assert run.load(run_dir / "cut" / "checkpoints" / "step_00000005") == 5
        state, losses = whole_state(worker), [run.trainer.step(step).summed["loss"] for step in (6, 7, 8)]
    last = latest(run_dir / "cut" / "checkpoints")
    measured = worker.evaluate(last, None)
    return state, losses, _texts(worker, last), measured, _evaluate_one_by_one(worker)


def _evaluate_one_by_one(worker):
    """Loss and load without padding, where this process is alone."""
    state = worker._state
    one_by_one = {"batch_size": 1, "num_sequences": None, "autocast": contextlib.nullcontext()}
    return evaluate(state.model, state.dataset, state.sampler, state.groups, **one_by_one)


def _texts(worker, path):
    """Greedy and sampled text for three prompts of different length, one of them empty."""
    greedy, sampled = SamplingConfig(max_new_tokens=12), SamplingConfig(max_new_tokens=12, temperature=0.8, top_p=0.9)
    texts = {}
    for sampling in (greedy, sampled):
        mine = worker.generate(path, ["400 green", "", "wall, and if one should fall there'd be 12"], sampling).texts
        parts = [None] * worker._state.groups.world_size
        torch.distributed.all_gather_object(parts, mine, group=worker._state.groups.control_group)
        texts |= {(sampling.temperature, index): text for part in parts for index, text in part.items()}
    return texts


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path):  # B25, B26, B30, P20
    every = {"eval_every": 3, "checkpoint_every": 4, "memory_checkpoint_every": 3}
    spec = make_spec(tmp_path, steps=10, micro_batch_size=2, keep_checkpoints=9, **every)
    run_ranks(2, _interrupt_and_resume, spec)
    lines = {name: read_metrics(tmp_path / name) for name in ("whole", "cut")}
    for kind, exact in (
        (0, ("step", "loss", "grad_norm", "lr", "max_vio_batch", "bias_checksum")),
        (1, ("step", "val_loss", "max_vio_global", "max_vio_held_out")),
    ):
        whole, cut = ([{key: line[key] for key in exact} for line in lines[name][kind]] for name in ("whole", "cut"))
        assert whole == cut
    assert len(lines["cut"][0]) == 10
    # A recompute routes again: neither its rows nor its choices are counted.
    accounts = ("tokens_routed", "tokens_sent", "tokens_received", "tokens_returned")
    assert {line[name] for line in lines["whole"][0] for name in accounts} == {12 * 16 * 2 * 2}
    histories = [read_load_history(tmp_path / name) for name in ("whole", "cut")]
    for left, right in zip(histories[0][:3], histories[1][:3], strict=True):
        assert left.tolist() == right.tolist()
    assert histories[0].bias[-1].any()
    assert [event["event"] for event in read_events(tmp_path / "cut")] == [
        "started", "memory_checkpoints", "checkpoint", "checkpoint", "interrupted",
        "resumed", "memory_checkpoints", "checkpoint", "checkpoint", "finished",
    ]  # fmt: skip
    # At other EP sizes: the same parameters at load, and the same losses up to rounding.
    saved = {world_size: run_ranks(world_size, _resume_elsewhere, spec)[0] for world_size in (1, 2, 3)}
    for world_size in (1, 3):
        assert all(torch.equal(saved[world_size][0][key], tensor) for key, tensor in saved[2][0].items())
        assert saved[world_size][1] == pytest.approx(saved[2][1], rel=1e-4)
        assert saved[world_size][2] == saved[2][2]
        assert saved[world_size][3].val_loss == pytest.approx(saved[2][3].val_loss, rel=1e-5)
        assert saved[world_size][3].num_tokens == saved[2][3].num_tokens
        # Held-out choices of two layers, top-2, and none of padding: 2 and 3 ranks pad here.
        load_SN = saved[world_size][3].load_SN
        assert load_SN.sum() == saved[2][3].num_tokens * 2 * 2
        assert (load_SN - saved[2][3].load_SN).abs().sum() <= 4  # rounding may turn a choice
    assert saved[1][3].val_loss == pytest.approx(saved[1][4].val_loss, rel=1e-6)  # padded batches count real sequences
    assert (saved[1][3].load_SN - saved[1][4].load_SN).abs().sum() <= 4
    assert len(saved[2][2]) == 6
    assert any(saved[2][2].values())
    assert [line["loss"] for line in lines["cut"][0][5:8]] == saved[2][1]


def _skip_and_more(rank, world_size, spec):
    results = {}
    # A gradient that overflows on one rank only: every rank skips, weights and bias stay.
    worker = join_worker(_with_run(spec, "overflow"), rank, world_size, "overflow")
    before = {}

    def poison(_module, _inputs, output):
        if worker._steps_seen == 3 and rank == 1:
            return InfiniteGradient.apply(output)
        return None

    worker._steps_seen = 0

    def count(_module, _inputs):
        worker._steps_seen += 1
        if worker._steps_seen in (3, 4):
            before[worker._steps_seen] = whole_state(worker)

    worker._state.model.register_forward_pre_hook(count)
    worker._state.model.norm.register_forward_hook(poison)
    worker.train()
    changed = [key for key in before[3] if not torch.equal(before[3][key], before[4][key])]
    results["overflow"] = (changed, worker.progress(0))
    # A frozen router keeps its bias while the others move.
    worker = join_worker(_with_run(spec, "frozen"), rank, world_size, "frozen")
    state = worker._state
    for name, router in state.routers.items():
        router.weight.requires_grad_(not name.startswith("layers.1"))
    frozen = replace_layout(worker)
    frozen.train()
    results["frozen"] = {name: router.expert_bias_E.abs().max().item() for name, router in state.routers.items()}
    # All communicators are made in join: a lazy one in the middle of a step would hang or stall on a bad network.
    worker = join_worker(_with_run(spec, "groups", eval_every=1), rank, world_size, "groups")
    made = []
    original = torch.distributed.distributed_c10d._new_process_group_helper
    torch.distributed.distributed_c10d._new_process_group_helper = lambda *a, **k: made.append(a) or original(*a, **k)
    try:
        worker.train()
    finally:
        torch.distributed.distributed_c10d._new_process_group_helper = original
    results["groups made"] = len(made)
    # Evaluation between steps, and a coordinator that fails, leave the training as it is.
    for name, run in (("plain", {}), ("evaluating", {"eval_every": 1})):
        worker, _ = _train(_with_run(spec, name, **run), rank, world_size)
        results[name] = whole_state(worker)
    flaky = FlakyCoordinator({2, 3, 6})
    worker, _ = _train(replace(_with_run(spec, "flaky"), call_coordinator=flaky), rank, world_size)
    results["flaky"] = whole_state(worker)
    results["flaky events"] = [line["event"] for line in worker.progress(0) if "event" in line]
    return results


class FlakyCoordinator:
    """A real coordinator that dies on the given calls, each time losing what it knew."""

    def __init__(self, fail_on):
        self.fail_on, self.calls, self.policy = fail_on, 0, CoordinatorPolicy()

    def __call__(self, message):
        self.calls += 1
        if self.calls in self.fail_on:
            self.policy = CoordinatorPolicy()
            raise ConnectionError("the coordinator died")
        return self.policy.handle(message)


def replace_layout(worker):
    """The worker with the layout read again, as when the routers are frozen before it is built."""
    from dispatch.balance import layout_of

    state = worker._state
    worker._joined = replace(state, law=Law(state.law.config, layout_of(state.routers)))
    return worker


def test_what_must_not_move_stays_and_what_must_moves(tmp_path):  # B3, B33, B35, B37, P16, P26
    two, other_rank = run_ranks(2, _skip_and_more, make_spec(tmp_path, steps=8))
    changed, lines = two["overflow"]
    assert changed == []
    train = [line for line in lines if line.get("kind") == "train"]
    assert [line["skipped"] for line in train] == [False, False, True, False, False, False, False, False]
    assert train[2]["bias_checksum"] == train[3]["bias_checksum"] != train[4]["bias_checksum"]
    assert other_rank["overflow"][0] == []
    assert {name: value > 0 for name, value in two["frozen"].items()} == {
        "layers.1.moe.router": False,
        "layers.2.moe.router": True,
    }
    biases = [tensor for key, tensor in two["plain"].items() if key.endswith("expert_bias_E")]
    assert len(biases) == 2
    assert all(bias.abs().max() > 0 for bias in biases)
    assert two["groups made"] == 0
    for other in ("evaluating", "flaky"):
        assert [key for key in two["plain"] if not torch.equal(two["plain"][key], two[other][key])] == []
    assert two["flaky events"][:2] == ["coordinator_lost", "coordinator_back"]


def test_every_step_accounts_for_every_assignment(tmp_path):  # P9, P17
    spec = make_spec(tmp_path, steps=3)
    run_ranks(3, _only_train, spec)
    train, _ = read_metrics(tmp_path / "run")
    expected = 12 * 16 * 2 * 2  # sequences x tokens x top_k x MoE layers
    for line in train:
        assert (
            line["tokens_routed"]
            == line["tokens_sent"]
            == line["tokens_received"]
            == line["tokens_returned"]
            == expected
        )
    history = read_load_history(tmp_path / "run")
    assert history.counts.sum(1).tolist() == [expected] * 3
    assert len({line["bias_version"] for line in train}) == 3


def _only_train(rank, world_size, spec):
    _train(spec, rank, world_size)


def _train_bf16(rank, world_size, spec):
    lines = {}
    for dtype in ("float32", "bfloat16"):
        worker, _ = _train(_with_run(spec, dtype, dtype=dtype), rank, world_size)
        kept = {tensor.dtype for tensor in whole_state(worker).values()}
        lines[dtype] = [line for line in worker.progress(0) if line.get("kind") == "train"], kept
    return lines


def test_bf16_computes_in_bf16_and_keeps_everything_else_in_fp32(tmp_path):  # B22, B23
    lines = run_ranks(2, _train_bf16, make_spec(tmp_path, steps=6))[0]
    (full, full_kept), (half, half_kept) = lines["float32"], lines["bfloat16"]
    assert full_kept == half_kept == {torch.float32}
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=2e-2)
    assert half[-1]["loss"] != full[-1]["loss"]
    # Half the bytes of every row travel, not of the weights and gradients of weights, which stay fp32.
    assert 0.45 < half[0]["sent_bytes"] / full[0]["sent_bytes"] < 0.75


def _train_none(rank, world_size, spec):
    worker, _ = _train(replace(spec, balance=BalanceConfig(law="none")), rank, world_size)
    return {name: router.expert_bias_E.abs().max().item() for name, router in worker._state.routers.items()}


def test_without_a_law_the_bias_stays_zero(tmp_path):
    assert set(run_ranks(2, _train_none, make_spec(tmp_path, steps=3))[0].values()) == {0.0}


def _go_on_after_damage(rank, world_size, spec):
    _, outcome = _train(spec, rank, world_size)
    assert outcome.step == 12
    if rank == 0:
        newest = latest(spec.run_dir / "checkpoints")
        file = min(newest.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-10])
    worker = join_worker(spec, rank, world_size, "again")
    outcome = worker.train(latest(spec.run_dir / "checkpoints"), None, True)
    assert (outcome.step, outcome.completed) == (12, True)
    return worker.progress(0) if rank == 0 else None


def test_a_run_that_failed_goes_on_from_before_a_damaged_checkpoint_with_a_warning(tmp_path):
    spec = make_spec(tmp_path, steps=12, checkpoint_every=5)
    told, _ = run_ranks(2, _go_on_after_damage, spec)
    (warning,) = [line for line in told if line.get("event") == "warning"]
    assert "step_00000012 is damaged" in warning["text"]
    assert [event["step"] for event in read_events(spec.run_dir) if event["event"] == "resumed"] == [10]
    assert [line["step"] for line in read_metrics(spec.run_dir)[0]] == list(range(1, 13))


def test_lines_that_were_told_are_not_kept(tmp_path):
    worker = Worker(make_spec(tmp_path))
    lines = [{"step": step} for step in range(4)]
    worker._lines.extend(lines[:3])
    assert worker.progress(0) == lines[:3]
    assert worker.progress(2) == worker.progress(2) == lines[2:3]  # an answer may be lost
    worker._lines.append(lines[3])
    assert worker.progress(3) == lines[3:]
    assert len(worker._lines) == 1


def _resume_forged(rank, world_size, spec):
    join_worker(spec, rank, world_size, "first").train()
    path = spec.run_dir / "checkpoints" / "step_00000002"
    good, told = read_manifest(path), []
    for wrong in ({"step": "2"}, {"bias_version": None}, {"load_since_eval": [1]}, {"load_since_eval": {}}):
        write_manifest(path, replace(good, extra={**good.extra, **wrong}))
        with pytest.raises(CheckpointCorrupt) as caught:
            join_worker(spec, rank, world_size, f"again {wrong}").train(path)
        told.append(caught.value.reason)
    return told


def test_extra_values_that_no_run_saves_are_damage_and_no_bug(tmp_path):
    [told] = run_ranks(1, _resume_forged, make_spec(tmp_path, steps=2))
    names = ("step", "bias_version", "load_since_eval", "load_since_eval")
    assert told == [f"has no {name} as a run saves it" for name in names]
