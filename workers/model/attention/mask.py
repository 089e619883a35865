"""Attention masks for sequences that are padded anywhere, packed documents, and reads from a cache."""

import torch
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


def visible_in_documents(document_starts: Tensor) -> Tensor:
    """Bool (B, 1, S, S) for documents that follow each other in a row: a token sees its own document up to itself.

    document_starts: int64 (B, S), where in the row the document of each token begins.
    """
    places = torch.arange(document_starts.shape[1], device=document_starts.device)
    not_before, not_after = places >= document_starts.unsqueeze(2), places <= places.unsqueeze(1)
    return (not_before & not_after).unsqueeze(1)


def within_window(seen: Tensor | None, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Bool (B, 1, Q, S): of what a query sees, the keys less than `window` positions before it.

    Args:
        seen: bool (B, 1, Q, S) of the functions above; None for causal order alone.
        query_positions: int64 (B, Q).
        key_positions: int64 (B, S).
    """
    distances = (query_positions.unsqueeze(2) - key_positions.unsqueeze(1)).unsqueeze(1)
    return (distances < window) & (distances >= 0 if seen is None else seen)


def scores_mask(mask: Tensor | None) -> dict[str, Tensor | bool]:
    """Arguments of `scaled_dot_product_attention`: the mask, or causal order alone, which has the faster kernels."""
    return {"is_causal": True} if mask is None else {"attn_mask": mask}
