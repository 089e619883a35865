"""The scores of attention and what they weigh, for every kind: begin with `attend`, which chooses the kernel."""

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
# Of flash attention, which is what torch's varlen attention calls.
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
        seen: a mask as of `visible`; documents that fill the rows, where K is their length and S this rank's part of
            it; None: each token sees itself and all before it.
        scale: factor on the scores, 1 / sqrt(width) by default.
        sinks: (heads,), as of `attend_with_sinks`.

    Documents are one kernel where there is one, and else take turns, those of one length together. Memory then grows
    with the square of a document at most, under a window with tokens times window, and never with that of a row.
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
    """What attention sees of a token, (B, S, ..., width) each, from all ranks that share its row, in one exchange.

    As they are where none do. Collective over these ranks, in backward too.
    """
    if not isinstance(seen, Documents) or seen.context is None or not seen.lengths:
        return first, second
    together = torch.cat([first, second], dim=-1).to(_compute_dtype(first))  # attention would cast them too
    whole = seen.context.whole(together, seen.seq_len)
    return whole[..., : first.shape[-1]], whole[..., first.shape[-1] :]


def varlen_kernel(queries: Tensor, values: Tensor) -> Varlen | None:
    """Attention of torch over sequences of any lengths; None where it cannot serve these tensors."""
    fits = max(queries.shape[-1], values.shape[-1]) <= MAX_FLASH_WIDTH
    if not (queries.is_cuda and fits and _compute_dtype(queries) in (torch.bfloat16, torch.float16)):
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(queries.device) < (8, 0):
        return None
    # Here, since only some devices need it.
    from torch.nn.attention import varlen

    takes = signature(varlen.varlen_attn).parameters  # without windows in torch 2.10
    return cast(Varlen, varlen.varlen_attn) if {"scale", "window_size", "enable_gqa"} <= takes.keys() else None


def attend_by_varlen(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, scale: float | None, varlen: Varlen
) -> Tensor:
    """As `attend` of whole keys and values, by one call of what has the arguments of torch's `varlen_attn`."""
    width = max(queries.shape[-1], values.shape[-1])
    width += -width % FLASH_WIDTH_STEP
    near_keys, near_values, *places = _packed(keys, values, documents)
    # Its window counts the tokens before a query alone; (-1, 0) is causal order. The last query sees the last key.
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
    """The keys and values that are seen, (T, kv_heads, width), the offsets of queries and keys, and their longest."""
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
    """What autocast makes of x, which does not know varlen attention."""
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
    # A copy of a single part too: as a view it would keep the whole tensor that it is cut of until backward.
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
