"""Chunks, overlap and rounds change the order of a layer's work and nothing else."""

import functools

import pytest
import torch
import torch.distributed as dist

from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.diagnosis.activity_tracker import PendingCollective, in_backward
from dispatch.errors import InvalidValue
from dispatch.exchange import token_exchange as exchange
from dispatch.exchange.local import LocalDispatcher
from dispatch.layer import MoELayer
from tests.dispatch.exchange.kinds import KINDS
from tests.dispatch.order import hear_experts
from tests.ranks import run_ranks

HIDDEN, NUM_EXPERTS = 16, 8
CONFIG = MoEConfig(num_experts=NUM_EXPERTS, top_k=3, ffn_hidden=12, num_shared_experts=1)


def _outcome(dispatcher, schedule, num_tokens, hot=False):
    """Output and all gradients of one layer on this rank, float64."""
    torch.manual_seed(5)
    layer = MoELayer(HIDDEN, CONFIG, dispatcher, schedule).double()
    if hot:  # all tokens to the experts of the first rank
        layer.router.expert_bias_E[: CONFIG.top_k] = 50.0
    torch.manual_seed(dispatcher.ep_rank)
    x = torch.randn(num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (y * torch.randn(num_tokens, HIDDEN, dtype=torch.float64)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def _schedules_on_ranks(rank, world_size, kind):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    outcomes = {}
    for num_chunks in (1, 2, 5):
        for overlap in (True, False):
            schedule = ScheduleConfig(num_chunks=num_chunks, overlap=overlap)
            dispatcher = KINDS[kind](NUM_EXPERTS, dist.group.WORLD)
            # A rank without tokens, one with fewer tokens than chunks.
            outcomes[num_chunks, overlap] = _outcome(dispatcher, schedule, (23, 0, 3, 17)[rank])
    return outcomes


@pytest.mark.parametrize(("kind", "world_size"), [("rank", 2), ("assignment", 2), ("rank", 3), ("node, 2 a node", 4)])
def test_overlap_changes_no_bit_and_chunks_only_the_rounding(kind, world_size):  # P7
    for outcomes in run_ranks(world_size, _schedules_on_ranks, kind):
        plain = outcomes[1, False]
        for (num_chunks, overlap), outcome in outcomes.items():
            for name, value in outcome.items():
                assert torch.equal(value, outcomes[num_chunks, not overlap][name]), (num_chunks, overlap, name)
                # Not bit for bit: a matmul of other rows may sum in another order.
                torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-15)


def _order_on_ranks(rank, world_size, overlap):
    """What a layer of two chunks starts (s), awaits (w) and computes (e: experts, shared), forward and backward."""
    events = []

    def noted(letter, call, *args, **kwargs):
        events.append(letter)
        return call(*args, **kwargs)

    exchange.SplitSizes.all_to_all_into = functools.partialmethod(
        lambda self, *a, c=exchange.SplitSizes.all_to_all_into: noted("s", c, self, *a)
    )
    wait = PendingCollective.wait
    PendingCollective.wait = lambda self: (
        noted("w", wait, self) if self.collective.splits else wait(self)
    )  # only of rows
    schedule = ScheduleConfig(num_chunks=2, overlap=overlap)
    layer = MoELayer(HIDDEN, CONFIG, KINDS["rank"](NUM_EXPERTS, dist.group.WORLD), schedule)
    hear_experts(layer, events)
    layer.shared_experts.register_forward_pre_hook(lambda *_: events.append("h"))
    layer.shared_experts.register_full_backward_pre_hook(lambda *_: events.append("H"))
    y = layer(torch.randn(20, HIDDEN, requires_grad=True))
    events.append("|")
    y.sum().backward()
    return "".join(events)


def test_rows_travel_while_others_are_computed_in_forward_and_in_backward():  # P7
    # An exchange to the experts is two messages (slots, rows), one back a single one; gradients the other way about.
    [order] = set(run_ranks(2, _order_on_ranks, True))
    # Both chunks leave; shared experts; chunk by chunk: await, compute, send back; at last await both.
    assert order.split("|")[0] == "ssss" + "h" + "wwes" + "wwes" + "ww"
    # The same backwards: both gradients leave; ...; shared experts run before the last gradients are awaited.
    assert order.split("|")[1].replace("H", "", 1) == "ss" + "wEss" + "wEss" + "wwww"
    assert order.split("|")[1].index("H") < order.split("|")[1].index("wwww")
    [order] = set(run_ranks(2, _order_on_ranks, False))
    assert order.split("|")[0] == "sswwesw" * 2 + "h"


def _rounds_on_ranks(rank, world_size, kind):
    """The same batch with and without a bound, and the rows of each call of the experts, forward and recompute."""
    num_tokens = (40, 31, 0, 25)[rank]
    plain = _outcome(KINDS[kind](NUM_EXPERTS, dist.group.WORLD), ScheduleConfig(), num_tokens, hot=True)
    rows, dispatcher = [], KINDS[kind](NUM_EXPERTS, dist.group.WORLD)
    finish = dispatcher.finish_dispatch

    def noted(pending):
        arrived, handle = finish(pending)
        rows.append((in_backward(), len(handle.sources_R)))
        return arrived, handle

    dispatcher.finish_dispatch = noted
    bounded = _outcome(dispatcher, ScheduleConfig(max_rows=50), num_tokens, hot=True)
    reading = dispatcher.meter.take()
    return plain, bounded, rows, (reading.routed, reading.received, reading.busiest_rows)


@pytest.mark.parametrize(("kind", "world_size"), [("rank", 2), ("assignment", 3), ("node, 2 a node", 4)])
def test_a_bound_on_rows_is_kept_in_rounds_and_no_token_is_dropped(kind, world_size):  # P17
    results = run_ranks(world_size, _rounds_on_ranks, kind)
    for plain, bounded, rows, _ in results:
        for name, value in bounded.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-15)
        assert max(num for _, num in rows) <= 50
        # Every round once in forward and once more in backward.
        assert sorted(num for again, num in rows if again) == sorted(num for again, num in rows if not again)
    routed, received, busiest = zip(*(reading for *_, reading in results), strict=True)
    # Each assignment is counted once, though its row travels twice; a hot expert gets one of each token.
    num_tokens = sum((40, 31, 0, 25)[:world_size])
    assert sum(routed) == sum(received) == CONFIG.top_k * num_tokens
    assert busiest[0] == (num_tokens,)


def _local_and_its_rows():
    """A dispatcher of one rank, and the list to which it adds the expert rows of each dispatch."""
    rows, dispatcher = [], LocalDispatcher(NUM_EXPERTS)
    finish = dispatcher.finish_dispatch
    dispatcher.finish_dispatch = lambda pending: rows.append(len(pending.state[1].sources_R)) or finish(pending)
    return dispatcher, rows


def test_rounds_keep_to_the_bound_without_other_ranks_and_stop_at_single_tokens():
    dispatcher, rows = _local_and_its_rows()
    for bound, most in ((9, 9), (1, CONFIG.top_k)):  # one token brings 3 rows, which no number of rounds makes fewer
        rows.clear()
        layer = MoELayer(HIDDEN, CONFIG, dispatcher, ScheduleConfig(max_rows=bound))
        layer(torch.randn(17, HIDDEN, requires_grad=True)).sum().backward()
        assert max(rows) <= most
        assert sum(rows) == 2 * 17 * CONFIG.top_k


def test_chunks_within_the_bound_that_together_exceed_it_are_rounds():
    dispatcher, rows = _local_and_its_rows()
    layer = MoELayer(HIDDEN, CONFIG, dispatcher, ScheduleConfig(num_chunks=4, max_rows=16 * CONFIG.top_k - 1))
    layer(torch.randn(16, HIDDEN, requires_grad=True)).sum().backward()
    assert rows == [4 * CONFIG.top_k] * 4 * 2  # each chunk once in forward and once more in backward


def test_a_batch_within_the_bound_is_not_cut():
    layer = MoELayer(HIDDEN, CONFIG, LocalDispatcher(NUM_EXPERTS), ScheduleConfig(max_rows=17 * 3))
    calls = []
    layer.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    layer(torch.randn(17, HIDDEN, requires_grad=True)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(("settings", "words"), [({"num_chunks": 0}, "num_chunks"), ({"max_rows": -1}, "max_rows")])
def test_impossible_schedules_are_refused(settings, words):
    with pytest.raises(ValueError, match=rf"{words} \((0|-1)\)"):
        ScheduleConfig(**settings)


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool), torch.ones(2, 3)]
)
def test_a_token_mask_of_another_shape_or_dtype_is_refused(mask):
    layer = MoELayer(HIDDEN, CONFIG, LocalDispatcher(NUM_EXPERTS))
    with pytest.raises(ValueError, match=r"token_mask is .*; it must be torch.bool \(2, 3\)"):
        layer(torch.randn(2, 3, HIDDEN), mask)


def test_a_layer_is_refused_on_a_dispatcher_of_another_size():
    config = MoEConfig(num_experts=8, top_k=2, ffn_hidden=4)
    dispatcher = LocalDispatcher(8)
    MoELayer(4, config, dispatcher)
    dispatcher.top_k = 4  # as `make_dispatcher` notes it
    with pytest.raises(InvalidValue, match="the dispatcher was made for top_k 4, the layer has 2"):
        MoELayer(4, config, dispatcher)
    with pytest.raises(InvalidValue, match="the dispatcher places 6 experts, the layer has 8"):
        MoELayer(4, config, LocalDispatcher(6))
