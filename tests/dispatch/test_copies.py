"""Experts with copies train as those without: the same outputs, gradients, counts and weights after every step."""

import pytest
import torch
import torch.distributed as dist

from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.copies import LayerCopies
from dispatch.exchange.expert_copies import ExpertCopies, place_copies
from dispatch.exchange.local import LocalDispatcher
from dispatch.layer import MoELayer
from tests.dispatch.exchange.kinds import KINDS
from tests.ranks import run_ranks

HIDDEN, STEPS = 12, 6
KINDS_WITH_COPIES = [kind for kind in KINDS if kind != "deep_ep"]
# Each exchange, and each way to compute with one of them.
CASES = [
    *((kind, ScheduleConfig(num_chunks=3), {}) for kind in KINDS_WITH_COPIES),
    ("rank", ScheduleConfig(max_rows=8), {}),
    ("rank", ScheduleConfig(), {"expert_biases": True, "swiglu_limit": 1.0}),
]


def _layer(kind, schedule, experts):
    torch.manual_seed(7 + dist.get_rank())
    config = MoEConfig(num_experts=9, top_k=3, ffn_hidden=8, **experts)
    layer = MoELayer(HIDDEN, config, KINDS[kind](9, dist.group.WORLD), schedule)
    for name, parameter in layer.named_parameters():
        if not name.startswith("experts."):
            dist.broadcast(parameter.data, 0)
    # Expert 4 is hot, expert 8 never chosen.
    layer.router.expert_bias_E.copy_(torch.tensor([0, 0, 0, 0, 5.0, 0, 0, 0, -5.0]))
    return layer


def _tokens(rank, step, micro):
    """Of a rank in a micro-batch; at times it has none."""
    draw = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    num_tokens = 0 if (step + micro) % 4 == rank else 5 + 3 * rank
    shape = (num_tokens, HIDDEN)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


def _placements(world_size):
    """None; by load; others, of which one leaves the owner without tokens; none again."""
    by_load = place_copies([10, 10, 10, 10, 90, 10, 10, 10, 0], world_size, 2)
    none = ExpertCopies(by_load.placement)
    assert by_load.num_copies
    shares = none.num_shares
    everywhere = tuple(share // none.shares_per_rank for share in range(shares))
    away = ExpertCopies(none.placement, {0: (world_size - 1,) * shares, 4: everywhere, 8: everywhere})
    return [none, by_load, by_load, away, none, by_load]


def _train(layer, rank, placements):
    """Outputs, and after each step gradients and weights; two micro-batches a step, AdamW."""
    copies = None if placements is None else LayerCopies(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    seen = []
    for step in range(STEPS):
        if copies:
            copies.place(placements[step])
            for each in copies.send_weights():
                each.wait()
        for micro in range(2):
            x_TH, grad_output_TH = _tokens(rank, step, micro)
            x_TH.requires_grad_()
            y_TH = layer(x_TH)
            (y_TH * grad_output_TH).sum().backward()
            seen += [y_TH.detach(), x_TH.grad]
        if copies:
            copies.sum_gradients()
        for name, parameter in layer.named_parameters():
            if not name.startswith("experts."):
                dist.all_reduce(parameter.grad)
        seen += [parameter.grad.clone() for parameter in layer.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        seen += [parameter.detach().clone() for parameter in layer.parameters()]
    return seen, layer.router.tokens_per_expert_E


def _compare(rank, world_size):
    torch.set_default_dtype(torch.float64)
    for case in CASES:
        plain, copied = (_layer(*case) for _ in range(2))
        without, counts = _train(plain, rank, None)
        with_copies, same_counts = _train(copied, rank, _placements(world_size))
        assert torch.equal(counts, same_counts)
        for theirs, ours in zip(without, with_copies, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-10, atol=1e-13, msg=lambda text, case=case: f"{case}: {text}"
            )
    return True


@pytest.mark.slow  # test_expert_copies trains with copies, too
@pytest.mark.parametrize("world_size", [3, 4])
def test_a_layer_with_copies_trains_as_without(world_size):  # P19
    assert all(run_ranks(world_size, _compare, timeout_s=120))


def _spread(rank, world_size):
    """Rows that each rank computes without copies and with them, and whether these took memory."""
    layer = _layer("rank", ScheduleConfig(), {})
    none, rows = _placements(world_size)[0], []
    copies = LayerCopies(layer)
    for copies_per_rank in (0, 2):
        # The first pass counts what the second places.
        load_E = layer.router.tokens_per_expert_E.clone()
        dist.all_reduce(load_E)
        copies.place(place_copies(load_E.tolist(), world_size, copies_per_rank))
        for each in copies.send_weights():
            each.wait()
        torch.manual_seed(rank)
        layer(torch.randn(400, HIDDEN))
        rows.append(layer.dispatcher.meter.take().received)
    held = layer.experts.gate_up_proj.untyped_storage().nbytes()
    names = (list(dict(layer.named_parameters())), list(layer.state_dict()))
    copies.place(none)
    freed = layer.experts.gate_up_proj.untyped_storage().nbytes()
    assert freed == layer.experts.gate_up_proj.nbytes
    plain = _layer("rank", ScheduleConfig(), {})
    assert names == (list(dict(plain.named_parameters())), list(plain.state_dict()))  # copies are no parameters
    return rows, held > freed


def test_copies_take_rows_off_the_busiest_rank_and_leave_no_memory_behind():
    results = run_ranks(4, _spread)
    without, with_copies = zip(*(rows for rows, _ in results), strict=True)
    assert sum(without) == sum(with_copies) == 4 * 400 * 3
    assert max(with_copies) < 0.8 * max(without)
    assert any(held for _, held in results)


def _messages(rank, world_size):
    """How many tensors of weights are sent after each placement, where one of two is frozen."""
    layer = _layer("rank", ScheduleConfig(), {})
    layer.experts.down_proj.requires_grad_(False)
    copies, numbers = LayerCopies(layer), []
    for placed in _placements(world_size):
        copies.place(placed)
        pending = copies.send_weights()
        for each in pending:
            each.wait()
        numbers.append(len(pending))
    return numbers


def test_frozen_weights_are_sent_once_after_a_placement():
    assert run_ranks(3, _messages) == [[0, 2, 1, 2, 0, 2]] * 3


def test_a_dispatcher_of_one_rank_knows_no_copies():
    layer = MoELayer(8, MoEConfig(num_experts=4, top_k=2, ffn_hidden=8), LocalDispatcher(4))
    with pytest.raises(ValueError, match="LocalDispatcher cannot send rows to copies"):
        LayerCopies(layer)
