"""Bytes that a micro-batch of one rank keeps for backward, part by part, and the scratch beside them.

The counts are those of kernels on CPUs, which a test compares with torch's own record of saved tensors. On CUDA
the fused RMSNorm keeps a little less. Attention is taken to be fused, as on CUDA in bf16 with any head and on CPUs with
heads of one width: no (S, S) matrix is kept. Packed documents under a window are counted as one document a row, which
keeps most.

Counts of a token, times T; letters: H hidden, F inner width of an expert, K top-k, E experts, L experts of this rank, R
expert rows, Q arrived rows, W expert ids a row, b bytes of an element in the compute dtype. The residual stream and all
norms are fp32 with any dtype. An index is int64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runtime.settings.size import Cast
from workers.model.attention.sinks import SINK_DIMS
from workers.model.loss import logits_at_once
from workers.model.model_config import ModelConfig

FP32, INDEX = 4, 8
MAX_RUN = 2048  # rows of an expert that the looped experts compute at once (dispatch.experts.looped)
Parts = dict[str, float]
HEAD, INPUTS, CAST, AT_LOSS, IN_BACKWARD = (
    "head and loss",
    "inputs of what is recomputed",
    "weights in the compute dtype",
    "at the loss",
    "in backward of a layer",
)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward of a rank works on, under balanced load.

    expert_rows, arrived_rows: of one MoE layer; a rank that exchanges nothing has its own tokens for arrived rows.
    ids_per_row: expert ids and weights that travel with a row. experts: how they are computed (dispatch.experts): fused
    on CUDA; on CPUs grouped, which keeps a copy of each expert row, or looped, one after the other. casts_experts: they
    are copied where the compute dtype is another, as they are not where they are gathered in it. packed: rows hold
    documents that attention keeps apart. varlen: one kernel serves documents and windows, as on CUDA in bf16; without
    it they are copied block by block (workers.model.attention.attend). context: ranks that share the sequences; tokens
    are a rank's own, and counted is the last of them, which sees most keys.
    """

    tokens: int
    seq_len: int
    num_local_experts: int
    expert_rows: float
    arrived_rows: float
    ids_per_row: int
    element_bytes: int
    experts: Literal["fused", "grouped", "looped"]
    exchanges: bool
    casts_experts: bool = True
    packed: bool = False
    varlen: bool = False
    context: int = 1

    @property
    def own_len(self) -> int:
        """Tokens of a sequence on this rank."""
        return -(-self.seq_len // self.context)

    @property
    def casts(self) -> bool:
        """Whether the compute dtype is not that of the weights."""
        return self.element_bytes != FP32


def attention_bytes(config: ModelConfig, batch: MicroBatch, window: int = 0) -> float:
    """The attention of one layer with its norms; `window` is that of the layer."""
    window = window if window < batch.seq_len else 0
    latent = config.attention == "latent"
    per_token = _latent_bytes(config, batch) if latent else _grouped_query_bytes(config, batch, window)
    masks = _mask_bytes(batch, window)
    num_norms = 2 if config.post_norms else 1  # with that of its output
    return batch.tokens * (num_norms * _norm_bytes(config.hidden) + per_token) + masks


def dense_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """A dense feed-forward with its norms."""
    own_input = 0 if batch.casts else FP32 * config.hidden
    per_token = own_input + _swiglu(config.hidden, config.dense_ffn_hidden, batch)
    return batch.tokens * (_ffn_norm_bytes(config) + per_token)


def router_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """The router and the shared experts of one layer with the norms of the layer's feed-forward."""
    moe = config.moe
    choice = INDEX * moe.top_k + FP32 * moe.num_experts
    if moe.normalize_weights:
        choice += FP32 * moe.top_k * (3 if moe.score == "sigmoid" else 1)
    shared = _swiglu(config.hidden, moe.ffn_hidden * moe.num_shared_experts, batch) if moe.num_shared_experts else 0
    if moe.shared_gate:  # what it multiplies, and itself; autocast makes a copy of its input
        shared += batch.element_bytes * (config.hidden * (2 if batch.casts else 1) + 1)
    return batch.tokens * (_ffn_norm_bytes(config) + FP32 * config.hidden + choice + shared)


def expert_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """Rows and inner activations of this rank's routed experts in one layer."""
    hidden, inner, size = config.hidden, config.moe.ffn_hidden, batch.element_bytes
    rows, arrived = batch.expert_rows, batch.arrived_rows
    gathered = (INDEX + FP32) * arrived * batch.ids_per_row  # the order of all assignments of arrived rows, and weights
    if batch.experts == "grouped" and config.moe.has_plain_experts:
        per_row = size * (hidden + 3 * inner) + FP32
        return gathered + rows * per_row + FP32 * batch.num_local_experts
    # The tokens themselves, uncast, are kept by the router already.
    kept_rows = size * hidden * arrived if batch.exchanges or batch.casts else 0
    if not config.moe.has_plain_experts:  # the same on all devices (dispatch.experts.variants)
        bias = size * hidden * batch.num_local_experts * (config.moe.expert_biases and batch.casts)
        return gathered + kept_rows + bias + rows * (FP32 + 2 * size * inner)
    if batch.experts == "fused":
        maps = INDEX * (2 * rows + arrived) + FP32 * batch.num_local_experts
        return gathered + kept_rows + maps + rows * (FP32 + 2 * size * inner)
    return gathered + kept_rows + rows * (INDEX + size + 2 * size * inner)


def row_map_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """Indices of one layer that its exchange and its experts hold; torch does not count them as saved tensors."""
    by_map = batch.experts == "grouped" or not config.moe.has_plain_experts
    held = INDEX * (2 * batch.expert_rows + batch.arrived_rows) if by_map else 0.0
    if batch.exchanges:
        held += INDEX * (2 * batch.arrived_rows + batch.tokens) + config.moe.top_k * batch.arrived_rows
    return held


def cast_expert_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """The weights of this rank's routed experts of one layer, kept where they are in another dtype or have adapters."""
    weights = 3 * batch.num_local_experts * config.hidden * config.moe.ffn_hidden
    adapted = config.lora.adapts_experts
    return batch.element_bytes * weights if (batch.casts and batch.casts_experts) or adapted else 0


def head_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """Ids and angles, the last norm, and the gradients that come with the loss: of its input and of the head.

    Multi-token prediction has its own.
    """
    num_heads = 1 + config.num_mtp_layers
    gradients = batch.element_bytes * batch.tokens * config.hidden + FP32 * config.vocab_size * config.hidden
    ids_and_norm = batch.tokens * (num_heads * INDEX + _norm_bytes(config.hidden))
    return ids_and_norm + 8 * batch.seq_len * config.rotary_dim / 2 + num_heads * gradients


def mtp_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """What the layer for multi-token prediction keeps besides a layer: three norms and the input of its projection."""
    return batch.tokens * (3 * _norm_bytes(config.hidden) + 2 * batch.element_bytes * config.hidden)


def saved_bytes(config: ModelConfig, batch: MicroBatch, cast: Cast, num_adapters: int = 0) -> Parts:
    """What is kept from forward to backward, by part.

    cast: of the dense weights. num_adapters: of dense matrices, where `model.lora` is on.
    """
    head = head_bytes(config, batch)
    if config.recompute == "full":
        # The input of each layer; the layer for multi-token prediction has two.
        return {INPUTS: _inputs(config, batch, config.num_layers + 2 * config.num_mtp_layers), HEAD: head}
    num_layers, num_moe = config.num_layers + config.num_mtp_layers, config.num_moe_layers
    kept = {
        "attention": sum(attention_bytes(config, batch, window) for window in _windows(config)),
        "dense feed-forward": config.num_dense_layers * dense_bytes(config, batch),
        "router and shared experts": num_moe * router_bytes(config, batch),
        "routed experts": num_moe * expert_bytes(config, batch),
        HEAD: head,
        CAST: batch.element_bytes * sum(cast) * batch.casts + num_moe * cast_expert_bytes(config, batch),
        "row maps": num_moe * row_map_bytes(config, batch),
    }
    if config.num_mtp_layers:
        kept["multi-token prediction"] = mtp_bytes(config, batch)
    if config.lora.rank:  # those of parts that are recomputed too: a little more than is kept
        kept["adapters"] = float(batch.tokens * batch.element_bytes * config.lora.rank * num_adapters)
    if config.recompute == "attention":
        kept["attention"] = _inputs(config, batch, num_layers)
        kept[CAST] -= batch.element_bytes * cast.attention * batch.casts
    if config.recompute == "experts":
        for name in ("router and shared experts", "routed experts", "row maps"):
            del kept[name]
        kept[INPUTS] = num_moe * _inputs(config, batch, 1)
        kept[CAST] = batch.element_bytes * (cast.attention + cast.others) * batch.casts
    return kept


def scratch_bytes(config: ModelConfig, batch: MicroBatch) -> Parts:
    """The largest that is held besides, at the loss or in the backward of one layer; not all of it at once."""
    has_moe = config.num_moe_layers > 0
    experts = _expert_scratch(config, batch) if has_moe else 0.0
    layer = max(experts, _dense_scratch(config, batch), _attention_scratch(config, batch))
    return {AT_LOSS: _loss_scratch(config, batch), IN_BACKWARD: _recomputed_bytes(config, batch) + layer}


def _recomputed_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    """What a recompute makes again in the backward of one layer."""
    parts = (router_bytes, expert_bytes, row_map_bytes, cast_expert_bytes)
    moe = sum(part(config, batch) for part in parts) if config.num_moe_layers else 0.0
    attention = max(attention_bytes(config, batch, window) for window in _windows(config))
    if config.recompute == "full":
        dense = dense_bytes(config, batch) if config.num_dense_layers else 0.0
        return attention + max(dense, moe) + config.num_mtp_layers * mtp_bytes(config, batch)
    return {"none": 0.0, "attention": attention, "experts": moe}[config.recompute]


def _windows(config: ModelConfig) -> list[int]:
    """The window of each layer, 0 for none; one for multi-token prediction has none."""
    layers = [config.sliding_window * config.has_window(index) for index in range(config.num_layers)]
    return layers + [0] * config.num_mtp_layers


def _inputs(config: ModelConfig, batch: MicroBatch, number: int) -> float:
    return FP32 * batch.tokens * config.hidden * number


def peak_bytes(saved: Parts, scratch: Parts) -> float:
    """The most of both at one moment: all that is kept at the loss, all but the head later."""
    kept = total(saved)
    return kept + max(scratch[AT_LOSS], scratch[IN_BACKWARD] - saved[HEAD])


def total(parts: Mapping[str, float]) -> float:
    """The sum of the parts."""
    return sum(parts.values())


def _norm_bytes(width: float, rows: int = 1) -> float:
    """RMSNorm: its input, the reciprocal root of each row, and the normalised input before its weight."""
    return FP32 * (2 * width + rows)


def _ffn_norm_bytes(config: ModelConfig) -> float:
    """The norm before a feed-forward, and that of its output."""
    return _norm_bytes(config.hidden) * (2 if config.post_norms else 1)


def _swiglu(hidden: int, inner: int, batch: MicroBatch) -> float:
    """gate, silu(gate), up and their product; autocast makes a copy of the input for each of two matmuls."""
    return batch.element_bytes * (4 * inner + (2 * hidden if batch.casts else 0))


def _grouped_query_bytes(config: ModelConfig, batch: MicroBatch, window: int) -> float:
    width, size = config.head_width, batch.element_bytes
    queries, values = config.num_heads * width, config.num_kv_heads * width
    rotated = queries + values
    by_block = (batch.packed or batch.context > 1 or window > 0) and not batch.varlen
    copies = by_block or config.attention_sinks or batch.context > 1  # else values are cut of the product of all
    kept: float = size * config.hidden  # the input
    if config.query_key_norm != "none":
        rows = config.num_heads + config.num_kv_heads if config.query_key_norm == "head" else 2
        # Under autocast the norm widens its input first; else that is the product itself.
        kept += _norm_bytes(rotated, rows) if batch.casts else FP32 * (rotated + rows)
    if config.clip_qkv:
        kept += size * ((0 if copies else values) + (rotated if config.query_key_norm != "none" else 0))
    if config.attention_gate:  # the sigmoid, and its product with the output; autocast makes a copy of its input
        kept += size * (2 * queries + (config.hidden if batch.casts else 0))
    if not copies or config.clip_qkv or (config.query_key_norm != "none" and not batch.casts):
        kept += size * (rotated + values)
    per_key = _keys_per_token(batch, window)
    sink_dims = SINK_DIMS if config.attention_sinks else 0
    heads, kv_heads = config.num_heads * (width + sink_dims), config.num_kv_heads * (width + sink_dims)
    kept += size * (2 * heads + (2 if copies else 1) * per_key * kv_heads)  # queries, keys, values and output
    return kept + size * queries * (by_block or config.attention_sinks) + FP32 * config.num_heads


def _keys_per_token(batch: MicroBatch, window: int) -> float:
    """Keys that are kept for each token of this rank, in rows of one document: those before them too, and copies."""
    before = batch.seq_len - batch.own_len
    if not window:
        return 1 + before / batch.own_len
    again = 0 if batch.varlen else (-(-batch.own_len // window) - 1) * window
    return 1 + (min(before, window) + again) / batch.own_len


def _mask_bytes(batch: MicroBatch, window: int) -> float:
    """Of the blocks of one layer that see keys before their own, as what is added to scores, one for each kind."""
    if batch.varlen or (batch.context == 1 and not window):
        return 0.0
    before = batch.seq_len - batch.own_len
    step = window or batch.own_len
    first, rest = min(step, batch.own_len), batch.own_len % step
    kinds = {(first, min(before, step) if window else before)}
    kinds |= {(step, step)} if batch.own_len >= 2 * step else set()
    kinds |= {(rest, step)} if rest and batch.own_len > step else set()
    return batch.element_bytes * sum(tokens * (seen + tokens) for tokens, seen in kinds if seen)


def _latent_bytes(config: ModelConfig, batch: MicroBatch) -> float:
    sizes, heads, size = config.latent, config.num_heads, batch.element_bytes
    score_width, per_key = sizes.nope_dim + sizes.rope_dim, _keys_per_token(batch, 0)
    # Where ranks share sequences the latents of all are a part of what was gathered.
    gathered = sizes.kv_rank if batch.context == 1 else per_key * (sizes.kv_rank + sizes.rope_dim)
    kept: float = size * config.hidden * (2 if batch.casts else 1)  # queries and keys each cast their input
    # Without autocast the norm keeps what the latent is cut of, with the shared key.
    kept += _norm_bytes(sizes.kv_rank) + (0 if batch.casts else FP32 * sizes.rope_dim) + size * gathered
    if sizes.query_rank:
        kept += _norm_bytes(sizes.query_rank) + size * sizes.query_rank
    per_head = 0.0
    if not batch.packed and batch.context == 1:
        per_head = 2 * score_width + sizes.nope_dim + 2 * sizes.value_dim  # queries, keys, keys with values, output
    elif batch.varlen:  # values and output as wide as keys; what `out_proj` reads
        per_head = 2 * score_width + 2 * per_key * score_width + sizes.value_dim
    else:  # values are a copy, and output is there by document and whole
        per_head = score_width + per_key * (score_width + sizes.value_dim) + 2 * sizes.value_dim
    return kept + size * heads * per_head + FP32 * heads


def _expert_scratch(config: ModelConfig, batch: MicroBatch) -> float:
    """Gradients of the weights, tensors as wide as an arrived row, and scratch of the rows (docs/performance.md)."""
    hidden, inner, size = config.hidden, config.moe.ffn_hidden, batch.element_bytes
    weights = 3 * batch.num_local_experts * inner * hidden
    if not config.moe.has_plain_experts:
        rows = batch.expert_rows * (2 * hidden + 10 * inner)
    elif batch.experts == "fused":
        rows = batch.expert_rows * (hidden + inner)
    elif batch.experts == "grouped":
        rows = batch.expert_rows * (2 * hidden + 7 * inner)
    else:
        rows = min(batch.expert_rows, MAX_RUN) * (3 * hidden + 4 * inner)
    widened = FP32 * weights if batch.casts and batch.casts_experts else 0
    return size * (weights + 6 * batch.arrived_rows * hidden + rows) + widened


def _loss_scratch(config: ModelConfig, batch: MicroBatch) -> float:
    """Logits of a chunk, their gradient and the head in the compute dtype, and what a chunk adds to its gradient."""
    chunk = logits_at_once(batch.tokens, config.vocab_size) * (FP32 + (batch.element_bytes if batch.casts else 0))
    return chunk + batch.element_bytes * config.vocab_size * config.hidden * (2 if batch.casts else 1)


def _attention_scratch(config: ModelConfig, batch: MicroBatch) -> float:
    """Gradients of queries, keys and values before and after they are rotated, which is done in fp32.

    Where ranks share sequences also those of whole sequences: as they are made, in parts, as they are sent, and in the
    one piece that the collective makes of them.
    """
    queries, values = config.num_heads * config.head_width, widths_of_keys(config)
    if config.attention == "latent":
        score_width = config.latent.nope_dim + config.latent.rope_dim
        queries = config.num_heads * score_width
        values = config.num_heads * (score_width + config.latent.value_dim) * batch.context
    shared = 4 * batch.context * widths_of_keys(config) if batch.context > 1 else 0
    return batch.tokens * (FP32 * (3 * queries + values) + batch.element_bytes * shared)


def widths_of_keys(config: ModelConfig) -> int:
    """Elements of what ranks that share sequences gather of a token: keys and values of all heads, or the latent."""
    if config.attention == "latent":
        return config.latent.kv_rank + config.latent.rope_dim
    return config.num_kv_heads * 2 * config.head_width


def _dense_scratch(config: ModelConfig, batch: MicroBatch) -> float:
    return batch.element_bytes * batch.tokens * (4 * config.dense_ffn_hidden + 4 * config.hidden)
