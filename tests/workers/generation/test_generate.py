"""Training, evaluation and generation choose the same experts for the same hidden states, here and in a replica."""

import threading
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from dispatch.balance import read_bias, read_counts, reset_counts
from dispatch.laws import BalanceConfig
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.checkpoints.checkpoint_files import latest
from workers.generation.generate import SamplingConfig, generate
from workers.training.aux_losses import AuxLossConfig
from workers.training.training_run import TrainingRun

SETTINGS = {
    "sign": {"balance": BalanceConfig(law="sign", rate=0.05), "aux": AuxLossConfig(loss="global_batch", z_alpha=1e-3)},
    "multiplicative": {"balance": BalanceConfig(law="multiplicative", rate=0.05)},
    "newton": {"balance": BalanceConfig(law="newton")},  # its state is more than the bias
}
PROMPTS, SAMPLING = ["400 green", "", "wall, and if one should fall there'd be 12"], SamplingConfig(max_new_tokens=4)


@contextmanager
def _recorded(routers, into):
    """Collects (x_TH, mask_T, topk_ids_TK, topk_weights_TK) of each forward, by name of the router."""

    def hook(name):
        def record(_module, inputs, outputs):
            into[name].append((inputs[0].detach(), inputs[1], outputs[0], outputs[1].detach()))

        return record

    handles = [router.register_forward_hook(hook(name)) for name, router in routers.items()]
    yield
    for handle in handles:
        handle.remove()


def _reroute(routers, records, *, training):
    """Forwards that route otherwise when repeated in this mode, and how many were repeated."""
    differing = repeated = 0
    for name, forwards in records.items():
        router = routers[name].train(training)
        for x_TH, mask_T, ids_TK, weights_TK in forwards:
            again_TK, weights_again_TK = router(x_TH, mask_T)
            differing += not (torch.equal(again_TK, ids_TK) and torch.equal(weights_again_TK, weights_TK))
            repeated += 1
        router.train()
    return differing, repeated


def _law_state(control, routers):
    """All that only training may move, as bytes that compare."""
    version, state = control.state()
    tensors = [state.bias_N, *state.extras.values(), read_bias(routers), read_counts(routers)]
    tensors += [router.statistic_scale for router in routers.values()]
    return version, [tensor.tolist() for tensor in tensors]


def _each(rank, world_size, function, arguments):
    """One start of the ranks for all laws."""
    return {law: function(rank, world_size, *each) for law, each in arguments.items()}


def _train_and_route(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, "trained")
    state = worker._state
    with state.open_control() as control:
        run = TrainingRun(state, control, publish=print, stop_requested=threading.Event())
        for step in range(1, 7):
            run.trainer.step(step)
        before = _law_state(control, state.routers)
        modes = {name: defaultdict(list) for name in ("train", "eval", "generate")}
        with _recorded(state.routers, modes["eval"]):
            run._evaluate(6)
        with _recorded(state.routers, modes["generate"]):
            ids = [list(prompt.encode()) or [256] for prompt in PROMPTS]
            generate(state.model, ids, SAMPLING, state.groups, eod_id=256, autocast=nullcontext())
        after = _law_state(control, state.routers)
        with _recorded(state.routers, modes["train"]):
            state.model(state.sampler.batch(6, rank, world_size, 0, 1)[0])
        assert read_counts(state.routers).any()  # this one trains, so it counts
        reset_counts(state.routers)
        found = {
            (mode, training): _reroute(state.routers, records, training=training)
            for mode, records in modes.items()
            for training in (True, False)
        }
        reset_counts(state.routers)
        with run._open_saver() as saver:
            saver.save_last(run._snapshot(6), threading.Event())
    return before, after, found, modes, read_bias(state.routers)


def _route_in_replica(rank, world_size, spec, trained_dir, modes):
    """A second model that knows the first one by its checkpoint alone, or its routers by their state dicts."""
    worker = join_worker(
        replace(spec, run_dir=spec.run_dir.parent / f"replica{world_size}"), rank, world_size, "replica"
    )
    routers = worker._state.routers
    worker.generate(latest(trained_dir / "checkpoints"), PROMPTS, SAMPLING)
    bias_N = read_bias(routers)
    found = [_reroute(routers, records, training=False) for records in modes.values()]
    pushed = {name: router.state_dict() for name, router in routers.items()}
    fresh = join_worker(replace(spec, run_dir=spec.run_dir.parent / f"fresh{world_size}"), rank, world_size, "fresh")
    without = sum(_reroute(fresh._state.routers, records, training=False)[0] for records in modes.values())
    for name, router in fresh._state.routers.items():
        router.bfloat16().load_state_dict(pushed[name])
    found += [_reroute(fresh._state.routers, records, training=False) for records in modes.values()]
    for router in routers.values():
        router.expert_bias_E.zero_()
    unbiased = sum(_reroute(routers, records, training=False)[0] for records in modes.values())
    return bias_N, found, without, unbiased


def test_training_evaluation_and_generation_route_alike_here_and_in_a_replica(tmp_path):  # B20, B40
    specs = {}
    for law, settings in SETTINGS.items():
        (tmp_path / law).mkdir()
        specs[law] = replace(make_spec(tmp_path / law, steps=6), **settings)
    trained = run_ranks(2, _each, _train_and_route, {law: (spec,) for law, spec in specs.items()})
    for before, after, found, _, bias_N in (of_rank[law] for of_rank in trained for law in SETTINGS):
        assert before == after  # version, law state, biases, counters
        assert bias_N.abs().max() > 0.01
        assert {differing for differing, _ in found.values()} == {0}
        assert min(repeated for _, repeated in found.values()) >= 2  # each mode, both MoE layers
    known = {law: (spec, spec.run_dir, trained[0][law][3]) for law, spec in specs.items()}
    replicas = [
        (law, of_rank[law])
        for world_size in (1, 3)
        for of_rank in run_ranks(world_size, _each, _route_in_replica, known)
        for law in SETTINGS
    ]
    assert len(replicas) == 12
    for law, (replica_bias_N, found, without, unbiased) in replicas:
        assert torch.equal(replica_bias_N, trained[0][law][4])
        assert {differing for differing, _ in found} == {0}
        assert min(repeated for _, repeated in found) >= 2
        assert without > 0
        assert unbiased > 0  # the bias is what is being tested


def _has_optimizer(rank, world_size, spec):
    return "optimizer" in vars(join_worker(spec, rank, world_size, "built")._state)


def test_ranks_without_text_build_no_optimizer_which_would_make_generation_start_later(tmp_path):
    spec = make_spec(tmp_path, steps=1)
    assert run_ranks(1, _has_optimizer, spec) == [True]
    assert run_ranks(1, _has_optimizer, replace(spec, data_dir=None)) == [False]
