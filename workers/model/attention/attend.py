"""Scaled dot-product attention for every kind of attention layer: begin with `attend`, which chooses the kernel."""

from collections.abc import Callable
from inspect import signature
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.attention.documents import Documents
from workers.model.attention.mask import scores_mask
from workers.model.attention.sinks import attend_with_sinks

Seen = Tensor | Documents | None
Varlen = Callable[..., Tensor]
# Limits of flash attention, which torch's varlen attention calls: the widest head, and what its width is a multiple of.
MAX_FLASH_WIDTH, FLASH_WIDTH_STEP = 256, 8


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Seen,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output of every head, (B, S, heads, value width).

    Args:
        queries: (B, S, heads, width).
        keys, values: (B, K, kv_heads, width); values may have a width of their own.
        seen: a mask as of `visible`; or the documents that fill the rows: K is then the length of a row, and S the
            number of this rank's tokens of it; None: each token sees itself and all before it.
        scale: factor on the scores, 1 / sqrt(width) by default.
        sinks: (heads,), as of `attend_with_sinks`.

    Documents are computed by one varlen kernel where torch has one for these tensors. Otherwise blocks of equal size
    are computed together, one size after the other: memory grows with the square of the longest document at most,
    under a window with tokens times window, and never with the square of a row.
    """
    if not isinstance(seen, Documents):
        return _attend_at_once(queries, keys, values, seen, scale, sinks)
    if not seen.lengths:
        return _attend_at_once(queries, keys, values, None, scale, sinks)
    varlen = varlen_kernel(queries, values) if sinks is None else None
    if varlen is not None:
        return attend_by_varlen(queries, keys, values, seen, scale, varlen)
    return _attend_by_block(queries, keys, values, seen, scale, sinks)


def of_whole_rows(seen: Seen, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, (B, S, ..., width) each, of whole rows, gathered in one collective from ranks that share rows.

    Where no ranks share rows it returns them as they are. Collective over the ranks that do, in backward too.
    """
    if not isinstance(seen, Documents) or seen.context is None or not seen.lengths:
        return first, second
    # Cast before they travel, which halves the bytes under autocast: attention would cast them anyway.
    together = torch.cat([first, second], dim=-1).to(_compute_dtype(first))
    whole = seen.context.gather_tokens(together, seen.seq_len)
    return whole[..., : first.shape[-1]], whole[..., first.shape[-1] :]


def varlen_kernel(queries: Tensor, values: Tensor) -> Varlen | None:
    """Attention of torch over sequences of any lengths; None where it cannot serve these tensors."""
    fits = max(queries.shape[-1], values.shape[-1]) <= MAX_FLASH_WIDTH
    if not (queries.is_cuda and fits and _compute_dtype(queries) in (torch.bfloat16, torch.float16)):
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(queries.device) < (8, 0):
        return None
    # Imported here, since only some devices need it.
    from torch.nn.attention import varlen

    takes = signature(varlen.varlen_attn).parameters  # without windows in torch 2.10
    return cast(Varlen, varlen.varlen_attn) if {"scale", "window_size", "enable_gqa"} <= takes.keys() else None


def attend_by_varlen(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, scale: float | None, varlen: Varlen
) -> Tensor:
    """As `attend` with documents, by one call of `varlen`, which has the signature of torch's `varlen_attn`."""
    width = max(queries.shape[-1], values.shape[-1])
    width += -width % FLASH_WIDTH_STEP
    near_keys, near_values, *places = _packed(keys, values, documents)
    # The kernel's window counts the tokens before a query, without itself; (-1, 0) is causal order. Queries are aligned
    # with the last keys, so that keys of other ranks come before them.
    window = (documents.window - 1 if documents.window else -1, 0)
    attended = varlen(
        *(
            _widened(each, width).to(_compute_dtype(queries))
            for each in (queries.flatten(0, 1), near_keys, near_values)
        ),
        *places,
        scale=scale or queries.shape[-1] ** -0.5,
        window_size=window,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return attended.view(*queries.shape[:3], width)[..., : values.shape[-1]]


def _packed(keys: Tensor, values: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Keys and values that this rank's queries see, (T, kv_heads, width); offsets and longest of queries and keys."""
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if documents.context is None:
        longest = max(documents.lengths)
        return keys, values, documents.offsets, documents.offsets, longest, longest
    cut = documents.by_document
    near_keys, near_values = (
        torch.cat([parts[each] for seen in cut.seen for each in seen])
        for parts in (keys.split(cut.parts), values.split(cut.parts))
    )
    return near_keys, near_values, *documents.places


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would cast x to. varlen attention is not among the functions that autocast knows."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _attend_by_block(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, scale: float | None, sinks: Tensor | None
) -> Tensor:
    cut = documents.by_window
    query_parts = queries.flatten(0, 1).split([block.num_tokens for block in cut.blocks])
    key_parts, value_parts = (each.flatten(0, 1).split(cut.parts) for each in (keys, values))
    attended: dict[int, Tensor] = {}
    for block, places in cut.alike.items():
        number, seen = len(places), [part for place in places for part in cut.seen[place]]
        now = _stacked([query_parts[place] for place in places], number)
        near_keys, near_values = (
            _stacked([parts[each] for each in seen], number) for parts in (key_parts, value_parts)
        )
        found = _attend_at_once(now, near_keys, near_values, documents.mask_of(block), scale, sinks)
        attended.update(zip(places, found.unbind(), strict=True))
    return torch.cat([attended[place] for place in range(len(cut.blocks))]).view(*queries.shape[:3], -1)


def _stacked(parts: list[Tensor], number: int) -> Tensor:
    """(number, ...) from its parts, in order."""
    # A copy even of a single part: a view, saved for backward, would keep the whole tensor that it was cut from.
    return torch.cat(parts).view(number, -1, *parts[0].shape[1:])


def _attend_at_once(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor | None
) -> Tensor:
    grouped, width = queries.shape[2] != keys.shape[2], queries.shape[3]
    queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
    if sinks is not None:
        attended = attend_with_sinks(queries, keys, values, sinks, mask, scale or width**-0.5)
    else:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, scale=scale, enable_gqa=grouped, **scores_mask(mask)
        )
    return attended.transpose(1, 2)
