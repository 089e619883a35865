"""Attention sinks against a softmax with one more column: causal, masked, beside a cache, with all gradients."""

import math

import pytest
import torch
from torch import Tensor

from workers.model.attention import GroupedQueryAttention, KeyValueCache, causal_mask, rotary_table
from workers.model.attention.sinks import attend_with_sinks

BATCH, HEADS, KV_HEADS, PLACES, WIDTH = 2, 4, 2, 7, 6


def slow_attention(queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, seen: Tensor, scale: float) -> Tensor:
    keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
    scores = (queries @ keys.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ values


def inputs(num_queries: int = PLACES) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, heads, PLACES, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    queries, keys, values = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    sinks = torch.linspace(-1.5, 2.5, HEADS, dtype=torch.float64)
    return [each.requires_grad_() for each in (queries[:, :, -num_queries:].clone(), keys, values, sinks)]


def masks() -> dict[str, tuple[Tensor | None, Tensor]]:
    """What is given, and which of the keys it means."""
    causal = torch.ones(PLACES, PLACES, dtype=torch.bool).tril()
    padded = causal.expand(BATCH, 1, -1, -1).clone()
    padded[1, :, :, :3] = False  # three queries see nothing but the sink
    near = causal & ~causal.tril(-3)
    return {"causal": (None, causal), "window": (near, near), "padded": (padded, padded)}


@pytest.mark.parametrize("name", masks())
def test_outputs_and_gradients_are_those_of_a_softmax_with_one_more_column(name: str) -> None:
    given, seen = masks()[name]
    leaves, expected_of = inputs(), inputs()
    y = attend_with_sinks(*leaves, given, 0.3)
    expected = slow_attention(*expected_of, seen, 0.3)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    for leaf, other in zip(leaves, expected_of, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-11, atol=1e-11)


def test_one_query_of_a_cache_sees_the_keys_before_it() -> None:
    torch.manual_seed(0)
    attention = GroupedQueryAttention(24, 6, 2, bias=True, out_bias=True, sinks=True).double()
    assert attention.sinks is not None
    with torch.no_grad():
        attention.sinks.normal_()
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        positions = torch.arange(5).expand(2, -1)
        table = rotary_table(positions, 4, 1e4, device=x.device, dtype=x.dtype)
        expected, cache = attention(x, table), KeyValueCache(8)
        for place in range(5):
            here = slice(place, place + 1)
            seen = cache.begin(positions[:, here])
            y = attention(x[:, here], table[:, here], seen, cache)
            torch.testing.assert_close(y, expected[:, here], rtol=1e-12, atol=1e-12)
    mask = causal_mask(positions, positions, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(attention(x, table, mask), expected, rtol=1e-12, atol=1e-12)
