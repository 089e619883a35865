"""What is frozen stays bit for bit, and what is not trains as if nothing were frozen."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dispatch.balance import read_bias
from tests.ranks import run_ranks
from tests.workers.model.token_loss import token_nll_sum
from tests.workers.training.test_optimizer import small_model
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.model.freezing import NAMES, freeze, part_of
from workers.training.gradients import reduce_gradients
from workers.training.optimizer import OptimConfig
from workers.training.training_run import TrainingRun


def test_every_parameter_belongs_to_a_part() -> None:
    parts = {name: part_of(name) for name, _ in small_model().named_parameters()}
    assert set(parts.values()) == set(NAMES)
    assert parts["layers.1.moe.experts.down_proj"] == "experts"
    assert parts["layers.1.moe.shared_experts.down_proj.weight"] == "shared_experts"
    assert parts["layers.1.attention_norm.weight"] == "norms"


def test_wrong_names_and_a_model_without_anything_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim.freeze names expert, gate; the parts of a model are embedding, "):
        OptimConfig(freeze=("gate", "expert", "router"))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(small_model(), NAMES)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "frozen", [("experts",), ("router",), ("router", "experts", "attention", "embedding", "norms")]
)
def test_the_gradients_of_the_rest_are_those_of_the_whole(frozen: tuple[str, ...], recompute: str) -> None:
    model, token_ids = small_model().double(), torch.tensor([[1, 2, 3, 4, 5, 6], [3, 3, 1, 0, 2, 5]])
    object.__setattr__(model.config, "recompute", recompute)
    wanted = {}
    for parts in ((), frozen):
        freeze(model, parts)
        token_nll_sum(model(token_ids[:, :-1]), token_ids[:, 1:]).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        wanted = wanted or gradients
        model.zero_grad()
    trained = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert {part_of(name) for name in trained} == set(NAMES) - set(frozen)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-14)


def _train(rank, world_size, spec, name):
    """What moved, the bias, how many gradients were exchanged, and the part and size of each parameter."""
    worker = join_worker(spec, rank, world_size, name)
    state, sent = worker._state, []
    before, all_reduce = whole_state(worker), dist.all_reduce
    with state.open_control() as control:
        run = TrainingRun(state, control, publish=print, stop_requested=worker._stop_requested)
        for step in (1, 2, 3):
            run.trainer.step(step)

        def record(flat, group=None, **options):
            sent.append(flat.numel())
            return all_reduce(flat, group=group, **options)

        dist.all_reduce = record
        reduce_gradients(state.model, state.groups)
        dist.all_reduce = all_reduce
    moved = {key: not torch.equal(value, before[key]) for key, value in whole_state(worker).items()}
    sizes = [(part_of(name), parameter.numel()) for name, parameter in state.model.named_parameters()]
    return moved, read_bias(state.routers), sum(sent), sizes


def test_frozen_parts_keep_their_bits_their_bias_and_their_bandwidth(tmp_path):  # B35
    spec = make_spec(tmp_path)
    spec = replace(spec, parallel=replace(spec.parallel, ep_size=1))  # experts are replicated, so they are exchanged
    results = {}
    for frozen in ((), ("experts",), ("router",)):
        frozen_spec = replace(spec, optim=replace(spec.optim, freeze=frozen))
        results[frozen] = run_ranks(2, _train, frozen_spec, "-".join(("frozen", *frozen)))[0]
    for frozen, (moved, bias_N, num_sent, sizes) in results.items():
        stays = {key for key, has_moved in moved.items() if key.startswith("model.") and not has_moved}
        wanted = {key for key in moved if key.startswith("model.") and part_of(key) in frozen}
        if "router" in frozen:
            wanted |= {key for key in moved if key.endswith("expert_bias_E")}
        assert stays == wanted
        assert bool(bias_N.any()) == ("router" not in frozen)
        assert num_sent == sum(size for part, size in sizes if part not in frozen)
        assert not any(key.startswith("optim.") and part_of(key) in frozen for key in moved)
