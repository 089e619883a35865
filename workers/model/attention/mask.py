"""Attention masks for sequences that are padded anywhere, and for reads from a cache."""

from typing import Any

from torch import Tensor


def positions_of(token_mask: Tensor) -> Tensor:
    """Position of each real token in its sequence: int64 (B, S) from a bool mask; padding has any position."""
    return (token_mask.cumsum(-1) - 1).clamp(min=0)


def causal_mask(query_positions: Tensor, key_positions: Tensor, key_mask: Tensor) -> Tensor:
    """The mask, bool (B, 1, Q, S), by which a query sees the real keys at or before its position.

    Args:
        query_positions: int64 (B, Q).
        key_positions: int64 (B, S), of a cache and of this call.
        key_mask: bool (B, S), False for padding and for slots of a cache that are not filled.

    Padding may see no key at all; torch's attention gives zeros there, and no NaN.
    """
    mask = key_mask.unsqueeze(1) & (key_positions.unsqueeze(1) <= query_positions.unsqueeze(2))
    return mask.unsqueeze(1)


def limit_to_window(attn_mask: Tensor, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """The mask, bool (B, 1, Q, S), without the keys that are `window` or more positions before their query.

    Args:
        attn_mask: bool (B, 1, Q, S), from `causal_mask`.
        query_positions: int64 (B, Q).
        key_positions: int64 (B, S).
    """
    distances = (query_positions.unsqueeze(2) - key_positions.unsqueeze(1)).unsqueeze(1)
    return (distances < window) & attn_mask


def sdpa_mask(mask: Tensor | None) -> dict[str, Any]:
    """The mask argument of `scaled_dot_product_attention`; for None is_causal, which has faster kernels."""
    return {"is_causal": True} if mask is None else {"attn_mask": mask}
