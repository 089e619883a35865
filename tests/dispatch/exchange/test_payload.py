"""Rows coded in fp8: the documented bound, and that nothing but the rows on their way out is coded."""

import math

import pytest
import torch
import torch.distributed as dist

from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.payload import TILE, decode_fp8, encode_fp8
from tests.ranks import run_ranks


@pytest.mark.parametrize("hidden", [TILE, 3 * TILE, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_element_is_off_by_at_most_the_documented_bound(hidden, dtype):
    torch.manual_seed(0)
    rows = (torch.randn(300, hidden, dtype=torch.float64) * torch.logspace(-12, 3, 300).unsqueeze(1)).to(dtype)
    rows[0], rows[1, 0] = 0.0, 1e4  # a row of zeros; one element that dwarfs its tile
    coded = encode_fp8(rows)
    assert coded.shape == (300, hidden + 4 * -(-hidden // TILE))
    decoded = decode_fp8(coded, hidden, torch.float64)
    largest = torch.stack([tile.abs().amax(1) for tile in rows.double().split(TILE, 1)], 1)
    largest = largest.repeat_interleave(TILE, 1)[:, :hidden]
    bound = torch.maximum(rows.double().abs() / 16, largest / 458752) * (1 + 1e-6)
    error = (decoded - rows.double()).abs()
    assert (error <= bound).all()
    assert error.max() > 0
    assert not decoded[0].any()


@pytest.mark.parametrize("hidden", [2, TILE, 256])
def test_no_rows_and_one_row_are_coded_too(hidden):
    assert decode_fp8(encode_fp8(torch.empty(0, hidden)), hidden, torch.bfloat16).shape == (0, hidden)
    row = torch.full((1, hidden), 448.0)
    assert torch.equal(decode_fp8(encode_fp8(row), hidden, torch.float32), row)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tile_that_is_not_finite_arrives_as_nan_and_never_as_other_numbers(bad):
    rows = torch.full((1, 2 * TILE), 1000.0)
    rows[0, 3] = bad
    tile, other = decode_fp8(encode_fp8(rows), 2 * TILE, torch.float32).split(TILE, 1)
    assert tile.isnan().all()
    assert torch.equal(other, rows[:, TILE:])


def _coded_on_ranks(rank, world_size):
    """An exchange with fp8 and one without, on rows that were coded and decoded before: all numbers and the bytes."""
    torch.manual_seed(rank)
    x, ids = torch.randn(40, 256), torch.rand(40, 8).argsort(1)[:, :3]
    weights, cotangent = torch.rand(40, 3), torch.randn(40, 256)
    found = []
    for payload, rows in (("fp8", x), ("compute", decode_fp8(encode_fp8(x), 256, torch.float32))):
        dispatcher = AllToAllDispatcher(8, dist.group.WORLD, payload=payload)
        sent, leaf = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        arrived, handle = dispatcher.dispatch(sent, ids, leaf)
        copies = handle.expert_rows.copy(arrived) * handle.row_weights_R.unsqueeze(1)
        y = dispatcher.combine(handle.expert_rows.sum(copies), handle)
        (y * cotangent).sum().backward()
        found.append([y.detach(), sent.grad, leaf.grad])
        found[-1].append(dispatcher.meter.take().sent_bytes)
    return found


def test_fp8_is_the_plain_exchange_of_decoded_rows_with_a_gradient_that_passes_straight_through():
    for (*coded, coded_bytes), (*plain, plain_bytes) in run_ranks(2, _coded_on_ranks):
        for one, other in zip(coded, plain, strict=True):
            assert torch.equal(one, other)
        # Of four passes of 1024 bytes a row, one is 256 + 2 scales.
        assert 0.78 < coded_bytes / plain_bytes < 0.84
