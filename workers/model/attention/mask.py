"""Attention masks for sequences that are padded anywhere, and for reads from a cache."""

from typing import Any

from torch import Tensor


def positions_of(token_mask: Tensor) -> Tensor:
    """Position of each real token in its sequence: int64 (B, S) from a bool mask; padding has any position."""
    return (token_mask.cumsum(-1) - 1).clamp(min=0)


def visible(query_positions: Tensor, key_positions: Tensor, key_mask: Tensor) -> Tensor:
    """Bool (B, 1, Q, S): a query sees the real keys at or before its position. For every kind of attention.

    Args:
        query_positions: int64 (B, Q).
        key_positions: int64 (B, S), of a cache and of this call.
        key_mask: bool (B, S), False for padding and for places of a cache that are not filled.

    Padding may see no key at all; torch's attention gives zeros there, and no NaN.
    """
    seen = key_mask.unsqueeze(1) & (key_positions.unsqueeze(1) <= query_positions.unsqueeze(2))
    return seen.unsqueeze(1)


def within_window(seen: Tensor, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Bool (B, 1, Q, S): of what a query sees, the keys less than `window` positions before it.

    Args:
        seen: bool (B, 1, Q, S) of `visible`.
        query_positions: int64 (B, Q).
        key_positions: int64 (B, S).
    """
    distances = (query_positions.unsqueeze(2) - key_positions.unsqueeze(1)).unsqueeze(1)
    return (distances < window) & seen


def scores_mask(mask: Tensor | None) -> dict[str, Any]:
    """Arguments of `scaled_dot_product_attention`: the mask, or causal order alone, which has the faster kernels."""
    return {"is_causal": True} if mask is None else {"attn_mask": mask}
