"""The gradient of a whole step: of the language-model loss alone, or with auxiliary losses, in any layout of ranks."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from dispatch.config import ScheduleConfig
from dispatch.laws import LAWS, BalanceConfig
from tests.ranks import run_ranks
from tests.workers.training.slow_aux_losses import slow_balance_loss, slow_sequence_loss, slow_z_loss
from tests.workers.training_gang import assert_same_state, join_worker, make_spec, whole_state
from workers.distributed.parallel import ParallelConfig
from workers.training.aux_losses import AuxLossConfig

TOKENS, SEQUENCES, TOP_K = 12 * 16, 12, 2


def _with(spec, name, *, micro_batch_size=0, recompute="none", **sections):
    run = replace(spec.run, micro_batch_size=micro_batch_size)
    model = replace(spec.model, recompute=recompute)
    return replace(spec, run_dir=spec.run_dir.parent / name, run=run, model=model, **sections)


def _on_last_step(worker, look):
    """Train, and call look() when the gradients of the last step are there and weights and biases are still its own."""
    state, looked = worker._state, []
    counted = [0]

    def hook(*_):
        counted[0] += 1
        if counted[0] == state.spec.run.steps:
            with torch.enable_grad():
                looked.append(look())

    state.optimizer.register_step_pre_hook(hook)
    worker.train()
    return looked[0]


def _nll_mean(worker):
    """The language-model loss of the last step's batch, apart from the trainer."""
    state = worker._state
    ids, targets, _ = state.sampler.batch(state.spec.run.steps - 1, 0, 1, 0, 1)
    return state.model(ids, targets=targets).total / TOKENS


def _gates(worker):
    return [router.weight for router in worker._state.routers.values()]


def _gradients_by_law(rank, world_size, spec):
    """For each law: whether its bias has moved, and the gates that do not have the gradient of that loss alone."""
    found = {}
    for law in sorted(LAWS):
        for aux in (AuxLossConfig(), AuxLossConfig(loss="switch"), AuxLossConfig(z_alpha=1e-3)):
            name = f"{law}-{aux.loss}-{aux.z_alpha}"
            worker = join_worker(_with(spec, name, balance=BalanceConfig(law=law), aux=aux), rank, world_size, name)

            def differing(worker=worker):
                # Before the loss is computed anew, which observes, too.
                grads = [weight.grad.clone() for weight in _gates(worker)]
                alone = torch.autograd.grad(_nll_mean(worker), _gates(worker))
                return sum(not torch.equal(left, right) for left, right in zip(grads, alone, strict=True))

            num_differing = _on_last_step(worker, differing)
            moved = any(bool(router.expert_bias_E.any()) for router in worker._state.routers.values())
            found.setdefault((law, aux.active), []).append((moved, num_differing))
    return found


def test_without_auxiliary_loss_the_gates_have_the_gradient_of_the_language_model_loss_bit_for_bit(tmp_path):
    spec = make_spec(tmp_path, steps=3)
    spec = replace(spec, optim=replace(spec.optim, grad_clip=0.0))
    found = run_ranks(1, _gradients_by_law, spec)[0]
    for law in LAWS:
        assert found[law, False] == [(law != "none", 0)]
        assert found[law, True] == [(law != "none", 2)] * 2  # both MoE layers


def _gradients_by_formula(rank, world_size, spec):
    found = {}
    for loss in ("switch", "global_batch", "sequence"):
        aux = AuxLossConfig(loss=loss, alpha=0.5, z_alpha=0.25)
        worker = join_worker(_with(spec, loss, aux=aux), rank, world_size, loss, float64=True)

        def compare(worker=worker, aux=aux):
            grads = [weight.grad.clone() for weight in _gates(worker)]
            terms = []

            def collect(router, inputs, outputs):
                logits_TE, choice = linear(inputs[0], router.weight), outputs[0]
                if aux.loss == "sequence":
                    balance = slow_sequence_loss(logits_TE, TOP_K, "sigmoid", [16] * SEQUENCES, 16)
                else:
                    balance = slow_balance_loss(logits_TE, choice, "sigmoid")
                terms.append((balance, slow_z_loss(logits_TE)))

            handles = [router.register_forward_hook(collect) for router in worker._state.routers.values()]
            nll = _nll_mean(worker)
            [handle.remove() for handle in handles]
            total = nll + sum(aux.alpha * balance + aux.z_alpha * z for balance, z in terms)  # summed over the layers
            means = [float(sum(parts)) / len(terms) for parts in zip(*torch.tensor(terms).tolist(), strict=True)]
            return grads, torch.autograd.grad(total, _gates(worker)), (float(nll.detach()), *means)

        grads, expected, losses = _on_last_step(worker, compare)
        line = [line for line in worker.progress(0) if line.get("kind") == "train"][-1]
        found[loss] = grads, expected, losses, (line["loss"], line["aux_loss"], line["z_loss"])
    return found


def test_step_has_the_gradient_of_the_papers_formulas_summed_over_layers_and_reports_their_mean(tmp_path):
    spec = make_spec(tmp_path, steps=2)
    spec = replace(spec, optim=replace(spec.optim, grad_clip=0.0), balance=BalanceConfig(law="sign", rate=0.1))
    for loss, (grads, expected, losses, line) in run_ranks(1, _gradients_by_formula, spec)[0].items():
        for left, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-15, msg=lambda m, n=loss: f"{n}: {m}")
        assert line == pytest.approx(losses, rel=1e-10)


# By number of ranks: sequences of a micro-batch (0: all), recompute, and how the ranks divide the work.
LAYOUTS = {
    1: [(0, "none", {}), (3, "full", {}), (1, "experts", {})],
    2: [(0, "none", {}), (2, "full", {}), (0, "experts", {"ep_size": 1, "schedule": ScheduleConfig(num_chunks=2)})],
    4: [(0, "full", {}), (0, "attention", {"ep_size": 2}), (1, "none", {"ep_size": 1})],
}
ANYWHERE, IN_ONE_MICRO_BATCH, OFF = (
    AuxLossConfig(loss="sequence", alpha=0.5, z_alpha=0.25),
    AuxLossConfig(loss="global_batch", alpha=0.5),
    AuxLossConfig(),
)


def _train_layouts(rank, world_size, spec):
    results = {}
    for index, (micro_batch_size, recompute, parallel) in enumerate(LAYOUTS[world_size]):
        losses = [ANYWHERE] if micro_batch_size else [ANYWHERE, IN_ONE_MICRO_BATCH]
        for aux in [*losses, OFF] if (world_size, index) == (1, 0) else losses:
            name = f"w{world_size}-{index}-{aux.loss}"
            layout = _with(
                spec,
                name,
                micro_batch_size=micro_batch_size,
                recompute=recompute,
                aux=aux,
                parallel=ParallelConfig(**parallel),
            )
            worker = join_worker(layout, rank, world_size, name, float64=True)
            worker.train()
            results[aux.loss, world_size, index] = (whole_state(worker), worker.progress(0))
    return results if rank == 0 else None


def test_any_layout_of_ranks_trains_the_same_model_with_auxiliary_losses(tmp_path):  # B12
    runs = {}
    for world_size in LAYOUTS:
        runs |= run_ranks(world_size, _train_layouts, make_spec(tmp_path, steps=2))[0]
    assert sorted(name for name, *_ in runs) == ["global_batch"] * 5 + ["none"] + ["sequence"] * 9
    off, off_lines = runs.pop(("none", 1, 0))
    assert {(line["aux_loss"], line["z_loss"]) for line in off_lines if line.get("kind") == "train"} == {(None, None)}
    for name, (state, lines) in runs.items():
        one, one_lines = runs[name[0], 1, 0]
        assert_same_state(state, one, name)
        for line, expected in zip(lines, one_lines, strict=True):
            if line.get("kind") == "train":
                for field in ("loss", "aux_loss", "grad_norm"):
                    assert line[field] == pytest.approx(expected[field], rel=1e-10)
                assert (line["z_loss"] is None) == (name[0] == "global_batch")
        gate = next(key for key in one if key.endswith("layers.1.moe.router.weight"))
        assert (state[gate] - off[gate]).abs().max() > 1e-3


def _train_in_parts(rank, world_size, spec):
    lines = {}
    for micro_batch_size in (0, 2):
        name = f"micro{micro_batch_size}"
        aux = AuxLossConfig(loss="global_batch", alpha=0.5)
        worker = join_worker(_with(spec, name, micro_batch_size=micro_batch_size, aux=aux), rank, world_size, name)
        worker.train()
        lines[micro_batch_size] = [line for line in worker.progress(0) if line.get("kind") == "train"]
    return lines


def test_global_batch_loss_in_micro_batches_is_near_that_of_the_whole_batch(tmp_path):
    lines = run_ranks(2, _train_in_parts, make_spec(tmp_path, steps=2))[0]
    whole, parts = lines[0][0], lines[2][0]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)  # of the untrained model
    assert parts["aux_loss"] != whole["aux_loss"]
    assert parts["aux_loss"] == pytest.approx(whole["aux_loss"], rel=0.02)
