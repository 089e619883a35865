"""What travels arrives: every assignment once, at its expert, and back. One launch a world size."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dispatch.errors import InvalidValue
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.factory import make_dispatcher, places_needed
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.registry import one_row_a_rank, register_backend
from tests.dispatch.exchange.kinds import KINDS
from tests.ranks import run_ranks

NUM_EXPERTS, TOP_K, ROUNDS = 8, 3, 30


def _ragged_case(rank, round_index):
    """Random tokens and distinct experts; at times a rank has no token, or all go to few experts."""
    generator = torch.Generator().manual_seed(1000 * round_index + rank)
    num_tokens = 0 if round_index % 3 == rank else int(torch.randint(1, 12, (1,), generator=generator))
    low = 3 if round_index % 4 == 0 else NUM_EXPERTS
    ids = torch.rand(num_tokens, low, generator=generator).argsort(1)[:, :TOP_K]
    return num_tokens, ids, torch.rand(num_tokens, TOP_K, generator=generator, dtype=torch.float64)


def _check_round(dispatcher, rank, round_index):
    num_tokens, ids, weights = _ragged_case(rank, round_index)
    # The payload names its origin; the slot is implied by (token, expert), since a token's experts differ.
    x = torch.stack([torch.full((num_tokens,), float(rank)), torch.arange(num_tokens).float()], 1).double()
    x.requires_grad_()
    weights.requires_grad_()
    arrived, handle = dispatcher.dispatch(x, ids, weights)
    rows = handle.expert_rows.copy(arrived)
    got = torch.cat([rows, handle.row_weights_R.unsqueeze(1)], 1).split(handle.tokens_per_local_expert_L)
    for expert, rows_of_expert in zip(dispatcher.placement.owned_by(dispatcher.ep_rank), got, strict=True):
        expected = []
        for source in range(dispatcher.placement.ep_size):
            _, source_ids, source_weights = _ragged_case(source, round_index)
            for token, slot in (source_ids == expert).nonzero().tolist():
                expected.append([float(source), float(token), source_weights[token, slot].item()])
        # In which order the sources come is the exchange's own affair.
        assert sorted(rows_of_expert.tolist()) == expected
    y = dispatcher.combine(handle.expert_rows.sum(rows * handle.row_weights_R.unsqueeze(1)), handle)
    torch.testing.assert_close(y, x * weights.sum(1, keepdim=True), rtol=1e-12, atol=0)
    cotangent = torch.rand(y.shape, dtype=torch.float64)
    (y * cotangent).sum().backward()
    torch.testing.assert_close(x.grad, cotangent * weights.detach().sum(1, keepdim=True), rtol=1e-12, atol=0)
    slot_grad = (cotangent * x.detach()).sum(1, keepdim=True).expand(-1, TOP_K)
    torch.testing.assert_close(weights.grad, slot_grad, rtol=1e-12, atol=1e-15)
    reading = dispatcher.meter.take()
    assert reading.routed == reading.sent == num_tokens * TOP_K
    assert reading.received == reading.returned == len(rows)
    return num_tokens * TOP_K, len(rows), reading.sent_bytes


def _exchange_on_ranks(rank, world_size, kind):
    # Uninitialised memory becomes NaN, so that a row which nobody wrote shows.
    torch.use_deterministic_algorithms(True)
    dispatcher = KINDS[kind](NUM_EXPERTS, dist.group.WORLD)
    assert torch.empty(3).isnan().all()
    totals = [_check_round(dispatcher, rank, round_index) for round_index in range(ROUNDS)]
    return tuple(map(sum, zip(*totals, strict=True)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_assignment_arrives_once_and_returns(kind, world_size):  # B13, P3, P4, P17
    sent, received, _ = zip(*run_ranks(world_size, _exchange_on_ranks, kind), strict=True)
    assert sum(sent) == sum(received) > 0


def _bytes_on_ranks(rank, world_size):
    """Bytes that each exchange hands to the other rank, forward and backward; assignments and tokens that cross."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(50, 64, generator=generator, requires_grad=True)
    ids = torch.rand(50, 16, generator=generator).argsort(1)[:, :8]
    sent = []
    for per_assignment in (True, False):
        dispatcher = AllToAllDispatcher(16, dist.group.WORLD, per_assignment)
        weights = torch.full((50, 8), 0.125, requires_grad=True)
        arrived, handle = dispatcher.dispatch(x, ids, weights)
        rows = handle.expert_rows.copy(arrived) * handle.row_weights_R.unsqueeze(1)
        dispatcher.combine(handle.expert_rows.sum(rows), handle).sum().backward()
        sent.append(dispatcher.meter.take().sent_bytes)
    return sent, (ids // 8 != rank).sum().item(), (ids // 8 != rank).any(1).sum().item()


def test_a_token_crosses_once_to_each_rank_that_it_needs():
    (by_rank_0, assignments_0, pairs_0), (by_rank_1, assignments_1, pairs_1) = run_ranks(2, _bytes_on_ranks)
    row, weight = 64 * 4, 4
    # This rank sends rows and weights forward; backward it sends the gradients of what came, and of its results' rows.
    for (by_assignment, by_rank), mine, other, my_pairs, other_pairs in (
        (by_rank_0, assignments_0, assignments_1, pairs_0, pairs_1),
        (by_rank_1, assignments_1, assignments_0, pairs_1, pairs_0),
    ):
        assert by_assignment == (mine + other) * (2 * row + weight) + mine  # ids: a byte each
        assert by_rank == (my_pairs + other_pairs) * (2 * row + 8 * weight) + my_pairs * 8
        assert by_rank < by_assignment / 3


def _chosen_exchange(rank, world_size):
    make = functools.partial(make_dispatcher, ep_group=dist.group.WORLD)
    chosen = [
        make(num_experts=64, hidden=512, top_k=8),  # nearly every token needs both ranks: 2 rows instead of 8
        make(num_experts=16, hidden=512, top_k=1),  # one expert is one rank: the same rows
        make(num_experts=64, hidden=512, top_k=8, exchange="assignment"),
    ]
    return [dispatcher.per_assignment for dispatcher in chosen]


def _impossible_top_k(_rank, _world_size):
    with pytest.raises(InvalidValue, match=r"top_k \(5\) must be between 1 and num_experts \(4\)"):
        make_dispatcher(num_experts=4, ep_group=dist.group.WORLD, hidden=8, top_k=5)


def test_more_experts_a_token_than_there_are_is_refused_before_costs_are_compared():
    run_ranks(2, _impossible_top_k)


def test_auto_takes_the_exchange_with_fewer_bytes():
    expected = [False, False, True]
    assert run_ranks(2, _chosen_exchange) == [expected, expected]


def test_no_exchange_can_be_called_auto():
    with pytest.raises(InvalidValue, match=r"parallel\.exchange 'auto' has a meaning of its own"):
        register_backend("auto", hops=one_row_a_rank)(lambda _context: LocalDispatcher(8))


def test_ranks_that_a_token_needs_in_hand_worked_cases():
    assert places_needed((2, 2), 1) == 1
    assert places_needed((2, 2), 4) == 2
    assert places_needed((2, 2), 2) == pytest.approx(2 * (1 - 1 / 6))  # 1 of 6 pairs avoids a given rank
    assert places_needed((2, 1), 1) == pytest.approx(1)  # two experts and one


def test_local_dispatch_is_the_same_exchange_without_a_wire():
    dispatcher = LocalDispatcher(NUM_EXPERTS)
    for round_index in range(1, ROUNDS):
        _check_round(dispatcher, 0, round_index)


def test_identity_experts_with_equal_weights_restore_the_input():  # P3
    x = torch.randn(9, 4)
    ids = torch.rand(9, NUM_EXPERTS).argsort(1)[:, :2]
    dispatcher = LocalDispatcher(NUM_EXPERTS)
    arrived, handle = dispatcher.dispatch(x, ids, torch.full((9, 2), 0.5))
    rows = handle.expert_rows.copy(arrived) * handle.row_weights_R.unsqueeze(1)
    assert torch.equal(dispatcher.combine(handle.expert_rows.sum(rows), handle), x)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(6, 2\)"):
        LocalDispatcher(8).dispatch(torch.randn(5, 4), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2))


def test_one_rank_refuses_the_handle_of_another_kind_of_dispatcher():
    dispatcher, x = LocalDispatcher(8), torch.randn(5, 4)
    arrived, handle = dispatcher.dispatch(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    with pytest.raises(ValueError, match="another kind of dispatcher made this handle"):
        dispatcher.combine(arrived, replace(handle, combine_state=()))


@pytest.mark.parametrize(("num_experts", "weights"), [(256, [1.0, 4.0, 2.0, 3.0]), (257, [1.0, 4.0, 3.0, 2.0])])
def test_one_rank_orders_rows_by_expert_also_where_a_byte_holds_no_more_ids(num_experts, weights):
    ids = torch.tensor([[0, num_experts - 1], [255, 1]])
    _, handle = LocalDispatcher(num_experts).dispatch(torch.ones(2, 4), ids, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert handle.row_weights_R.tolist() == weights
