"""Scaled dot-product attention for every kind of attention layer: begin with `attend`, which chooses the kernel."""

from collections.abc import Callable
from inspect import signature
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.attention.documents import Documents
from workers.model.attention.mask import sdpa_mask
from workers.model.attention.sinks import attend_with_sinks

# What a query sees: as a bool mask, as documents that fill the rows, or, for None, in causal order.
AttentionMask = Tensor | Documents | None
VarlenKernel = Callable[..., Tensor]
# Limits of flash attention, which torch's varlen attention calls: the widest head, and what its width is a multiple of.
MAX_FLASH_WIDTH, FLASH_WIDTH_STEP = 256, 8


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: AttentionMask,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output of every head, (B, S, heads, value width).

    Args:
        queries: (B, S, heads, width).
        keys, values: (B, K, kv_heads, width); values may have a width of their own.
        attn_mask: bool, as `causal_mask` makes it. Or the documents that fill the rows: K is then the length of a row,
            and S the number of this rank's tokens in it. None: each token sees itself and all tokens before it.
        scale: factor on the scores, 1 / sqrt(width) by default.
        sinks: (heads,), see `attend_with_sinks`.

    Documents are computed by one varlen kernel where torch has one for these tensors. Otherwise documents, or the
    blocks into which a sliding window cuts them, are computed by `scaled_dot_product_attention`, all of one size in one
    call. Its memory grows with the square of the longest document at most, under a window with the number of tokens
    times the window, and never with the square of a row.
    """
    if not isinstance(attn_mask, Documents):
        return _sdpa(queries, keys, values, attn_mask, scale, sinks)
    if not attn_mask.lengths:
        return _sdpa(queries, keys, values, None, scale, sinks)
    kernel = varlen_kernel(queries, values) if sinks is None else None
    if kernel is not None:
        return attend_by_varlen(queries, keys, values, attn_mask, scale, kernel)
    return _attend_by_block(queries, keys, values, attn_mask, scale, sinks)


def gather_rows(attn_mask: AttentionMask, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Gather two tensors, such as keys and values, from the ranks that share rows, in one collective.

    Takes this rank's tokens, (B, S, ..., width) each; returns all tokens of the rows. Where no ranks share rows, both
    are returned as they are. Collective over the ranks that share rows, in backward too.
    """
    if not isinstance(attn_mask, Documents) or attn_mask.context is None or not attn_mask.lengths:
        return first, second
    # Cast before they travel, which halves the bytes under autocast: attention would cast them anyway.
    concatenated = torch.cat([first, second], dim=-1).to(_compute_dtype(first))
    gathered = attn_mask.context.gather_tokens(concatenated, attn_mask.seq_len)
    return gathered[..., : first.shape[-1]], gathered[..., first.shape[-1] :]


def varlen_kernel(queries: Tensor, values: Tensor) -> VarlenKernel | None:
    """The `varlen_attn` of torch, for sequences of any lengths; None where it does not support these tensors."""
    fits = max(queries.shape[-1], values.shape[-1]) <= MAX_FLASH_WIDTH
    if not (queries.is_cuda and fits and _compute_dtype(queries) in (torch.bfloat16, torch.float16)):
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(queries.device) < (8, 0):
        return None
    # Imported here, since only some devices need it.
    from torch.nn.attention import varlen

    parameters = signature(varlen.varlen_attn).parameters  # torch 2.10 has no window_size
    supported = {"scale", "window_size", "enable_gqa"} <= parameters.keys()
    return cast(VarlenKernel, varlen.varlen_attn) if supported else None


def attend_by_varlen(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, scale: float | None, kernel: VarlenKernel
) -> Tensor:
    """As `attend` with documents, by one call of `kernel`, which has the signature of torch's `varlen_attn`."""
    width = max(queries.shape[-1], values.shape[-1])
    width += -width % FLASH_WIDTH_STEP
    packed_keys, packed_values, *sequence_arguments = _pack_keys(keys, values, documents)
    # The kernel's window counts the tokens before a query, without itself; (-1, 0) is causal order. Queries are aligned
    # with the last keys, so that keys of other ranks come before them.
    window = (documents.window - 1 if documents.window else -1, 0)
    attended = kernel(
        *(
            _pad_width(each, width).to(_compute_dtype(queries))
            for each in (queries.flatten(0, 1), packed_keys, packed_values)
        ),
        *sequence_arguments,
        scale=scale or queries.shape[-1] ** -0.5,
        window_size=window,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return attended.view(*queries.shape[:3], width)[..., : values.shape[-1]]


def _pack_keys(keys: Tensor, values: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """The keys and values that this rank's queries see, (T, kv_heads, width), and then cu_seq_q to max_k of the kernel.

    cu_seq_q and cu_seq_k are the offsets of the sequences of queries and keys, max_q and max_k their longest lengths.
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if documents.context is None:
        longest = max(documents.lengths)
        return keys, values, documents.offsets, documents.offsets, longest, longest
    cut = documents.document_cut
    packed_keys, packed_values = (
        torch.cat([parts[index] for key_parts in cut.key_parts for index in key_parts])
        for parts in (keys.split(cut.parts), values.split(cut.parts))
    )
    return packed_keys, packed_values, *documents.sequence_arguments


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would cast x to: autocast does not know varlen attention, so that we cast for it."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _pad_width(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _attend_by_block(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, scale: float | None, sinks: Tensor | None
) -> Tensor:
    cut = documents.window_cut
    query_parts = queries.flatten(0, 1).split([block.num_tokens for block in cut.blocks])
    key_parts, value_parts = (each.flatten(0, 1).split(cut.parts) for each in (keys, values))
    attended: dict[int, Tensor] = {}
    for block, indices in cut.indices_by_block.items():
        part_indices = [part for index in indices for part in cut.key_parts[index]]
        block_queries = _stack([query_parts[index] for index in indices], len(indices))
        block_keys, block_values = (
            _stack([parts[part] for part in part_indices], len(indices)) for parts in (key_parts, value_parts)
        )
        outputs = _sdpa(block_queries, block_keys, block_values, documents.block_mask(block), scale, sinks)
        attended.update(zip(indices, outputs.unbind(), strict=True))
    return torch.cat([attended[index] for index in range(len(cut.blocks))]).view(*queries.shape[:3], -1)


def _stack(parts: list[Tensor], num_blocks: int) -> Tensor:
    """(num_blocks, tokens of a block, ...) from the parts of these blocks, in order."""
    # A copy even of a single part: a view, saved for backward, would keep the whole tensor that it was cut from.
    return torch.cat(parts).view(num_blocks, -1, *parts[0].shape[1:])


def _sdpa(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor | None
) -> Tensor:
    grouped, width = queries.shape[2] != keys.shape[2], queries.shape[3]
    queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
    if sinks is not None:
        attended = attend_with_sinks(queries, keys, values, sinks, mask, scale or width**-0.5)
    else:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, scale=scale, enable_gqa=grouped, **sdpa_mask(mask)
        )
    return attended.transpose(1, 2)
