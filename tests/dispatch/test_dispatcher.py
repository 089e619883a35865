"""What travels arrives: every assignment once, at its expert, and back. One launch a world size."""

import pytest
import torch
import torch.distributed as dist

from dispatch.dispatcher import AllToAllDispatcher, LocalDispatcher
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
    rows, handle = dispatcher.dispatch(x, ids, weights)
    expected = []
    for expert in dispatcher.placement.owned_by(dispatcher.ep_rank):
        for source in range(dispatcher.placement.ep_size):
            _, source_ids, source_weights = _ragged_case(source, round_index)
            for token, slot in (source_ids == expert).nonzero().tolist():
                expected.append((source, token, source_weights[token, slot].item()))
    got = torch.cat([rows, handle.row_weights_R.unsqueeze(1)], 1).tolist()
    assert got == [list(map(float, row)) for row in expected]
    assert sum(handle.tokens_per_local_expert_L) == len(rows)
    y = dispatcher.combine(rows * handle.row_weights_R.unsqueeze(1), handle)
    torch.testing.assert_close(y, x * weights.sum(1, keepdim=True), rtol=1e-12, atol=0)
    cotangent = torch.rand(y.shape, dtype=torch.float64)
    (y * cotangent).sum().backward()
    torch.testing.assert_close(x.grad, cotangent * weights.detach().sum(1, keepdim=True), rtol=1e-12, atol=0)
    slot_grad = (cotangent * x.detach()).sum(1, keepdim=True).expand(-1, TOP_K)
    torch.testing.assert_close(weights.grad, slot_grad, rtol=1e-12, atol=1e-15)
    reading = dispatcher.meter.take()
    assert reading.routed == reading.sent == reading.returned == num_tokens * TOP_K
    assert reading.received == len(rows)
    return num_tokens * TOP_K, len(rows)


def _exchange_on_ranks(rank, world_size):
    # Uninitialised memory becomes NaN, so that a row which nobody wrote shows.
    torch.use_deterministic_algorithms(True)
    dispatcher = AllToAllDispatcher(NUM_EXPERTS, dist.group.WORLD)
    assert torch.empty(3).isnan().all()
    totals = [_check_round(dispatcher, rank, round_index) for round_index in range(ROUNDS)]
    return tuple(map(sum, zip(*totals, strict=True)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_assignment_arrives_once_and_returns(world_size):  # B13, P3, P4, P17
    sent, received = zip(*run_ranks(world_size, _exchange_on_ranks), strict=True)
    assert sum(sent) == sum(received) > 0


def test_local_dispatch_is_the_same_exchange_without_a_wire():
    dispatcher = LocalDispatcher(NUM_EXPERTS)
    for round_index in range(1, ROUNDS):
        _check_round(dispatcher, 0, round_index)


def test_identity_experts_with_equal_weights_restore_the_input():  # P3
    x = torch.randn(9, 4)
    ids = torch.rand(9, NUM_EXPERTS).argsort(1)[:, :2]
    dispatcher = LocalDispatcher(NUM_EXPERTS)
    rows, handle = dispatcher.dispatch(x, ids, torch.full((9, 2), 0.5))
    assert torch.equal(dispatcher.combine(rows * handle.row_weights_R.unsqueeze(1), handle), x)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(6, 2\)"):
        LocalDispatcher(8).dispatch(torch.randn(5, 4), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2))
