"""Rotation, and grouped queries against plain attention."""

import math

import torch

from workers.model.attention import GroupedQueryAttention, rotary_table, rotate

CPU = torch.device("cpu")


def test_rotation_is_a_rotation_of_each_pair_by_position_times_frequency() -> None:
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary_table(5, 6, 100.0, device=CPU, dtype=torch.float64))
    for position in range(5):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            real, imaginary = x[0, position, :, 2 * pair], x[0, position, :, 2 * pair + 1]
            expected = torch.stack(
                [
                    real * math.cos(angle) - imaginary * math.sin(angle),
                    real * math.sin(angle) + imaginary * math.cos(angle),
                ]
            )
            actual = turned[0, position, :, 2 * pair : 2 * pair + 2].T
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    table = rotary_table(20, 8, 1e4, device=CPU, dtype=torch.float64)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    queries, keys = rotate(query.expand(1, 20, 1, 8), table)[0, :, 0], rotate(key.expand(1, 20, 1, 8), table)[0, :, 0]
    scores = queries @ keys.T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-14)
    assert scores[0].unique().numel() == 20  # distance matters at all


def test_rotary_angles_of_far_positions_are_exact_in_fp32() -> None:
    table = rotary_table(100_001, 4, 1e4, device=CPU, dtype=torch.float32)
    assert table.dtype == torch.complex64
    angle = 100_000 * 1e4**-0.5
    assert abs(table[-1, 1].item() - complex(math.cos(angle), math.sin(angle))) < 1e-7


def test_grouped_queries_equal_plain_attention_with_repeated_keys_and_values() -> None:
    torch.manual_seed(0)
    attention = GroupedQueryAttention(24, num_heads=6, num_kv_heads=2).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    rotary = rotary_table(5, 4, 1e4, device=CPU, dtype=torch.float64)
    queries, keys, values = (x @ attention.qkv_proj.weight.T).view(2, 5, 10, 4).split([6, 2, 2], dim=2)
    queries, keys = rotate(queries, rotary), rotate(keys, rotary)
    # query heads 0 1 2 read key head 0, query heads 3 4 5 read key head 1
    keys, values = keys.repeat_interleave(3, dim=2), values.repeat_interleave(3, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / 2.0  # sqrt(head_dim)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2) @ attention.out_proj.weight.T
    torch.testing.assert_close(attention(x, rotary), expected, rtol=1e-12, atol=1e-14)


def test_attention_gradient_is_exact_in_float64() -> None:
    torch.manual_seed(0)
    attention = GroupedQueryAttention(8, num_heads=2, num_kv_heads=1).double()
    rotary = rotary_table(3, 4, 1e4, device=CPU, dtype=torch.float64)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    # Finite differences of 1e-6 show any step that rounds to fp32.
    assert torch.autograd.gradcheck(lambda value: attention(value, rotary), (x,), rtol=1e-6, atol=1e-8)
