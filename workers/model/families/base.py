"""What a model family declares: how its config.json becomes a ModelConfig, and where its tensors are in our state.

"Ours" are Trimtab's tensors, by canonical name (`workers.checkpoints.state`) without the section; "theirs" are those of
Hugging Face.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from workers.model.families.settings import Settings
from workers.model.families.stacks import index_of, stack_of
from workers.model.model_config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One tensor of a Hugging Face checkpoint, and the rows of one of our tensors that have the same values.

    Rotary positions rotate pairs of dimensions. Hugging Face pairs dimension i of a head with i + head_dim / 2, we pair
    neighbours (`workers.model.attention.rotary.rotate`). The scores are the same if the rows of queries and keys are
    reordered accordingly, for which `head_dim` is given.

    name: of their tensor, and shape: its shape.
    target: the name of our tensor, whose rows `first_row` and following this part fills.
    head_dim: rows of a head, whose first rotary_dim are stored as two halves; 0 where rows keep their order.
    rotary_dim: rows of a head that are rotated; 0 for all.
    is_copy: the tensor repeats that of another part. It may be missing; if it is there, it must be equal.
    num_items: where this part is an item of a stack (`stacks`), the number of items of that stack; else 0.
    is_transposed: theirs is (in, out) and ours (out, in).
    is_interleaved: theirs alternates between rows of the first and of the second half of ours, as gpt-oss does with
        gate and up.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    first_row: int = 0
    head_dim: int = 0
    rotary_dim: int = 0
    is_copy: bool = False
    num_items: int = 0
    is_transposed: bool = False
    is_interleaved: bool = False

    @property
    def file_name(self) -> str:
        """Name of the tensor in the files: this part itself, or the stack that it is an item of."""
        return stack_of(self.name)

    @property
    def item(self) -> int:
        """Index of this part in its stack."""
        return index_of(self.name)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of this part in our tensor."""
        return self.shape[::-1] if self.is_transposed else self.shape

    def rows_of(self, target: Tensor) -> Tensor:
        """The rows of our tensor that this part fills, as a view."""
        # Theirs may have one more axis, of size 1, as the selection bias of ERNIE.
        target = target if target.ndim == len(self.shape) else target.unsqueeze(0)
        return target.narrow(0, self.first_row, self.our_shape[0])

    def to_ours(self, rows: Tensor) -> Tensor:
        """Reorder from theirs to ours. rows: of whole heads, or a whole item of a stack."""
        rows = rows.t() if self.is_transposed else rows
        rows = torch.cat([rows[0::2], rows[1::2]]) if self.is_interleaved else rows
        return self._reorder(rows, lambda rotated: rotated.unflatten(1, (2, -1)))

    def to_theirs(self, rows: Tensor) -> Tensor:
        """Reorder from ours to theirs."""
        rows = torch.stack(rows.chunk(2), dim=1).flatten(0, 1) if self.is_interleaved else rows
        rows = rows.t() if self.is_transposed else rows
        return self._reorder(rows, lambda rotated: rotated.unflatten(1, (-1, 2)))

    def _reorder(self, rows: Tensor, split_pairs: Callable[[Tensor], Tensor]) -> Tensor:
        """Reorder the rotated rows of each head. split_pairs: maps (heads, rotary_dim, ...) to (heads, m, n, ...).

        The result has the rows in the order of the transposed (n, m).
        """
        if not self.head_dim:
            return rows
        heads = rows.unflatten(0, (-1, self.head_dim))
        rotary_dim = self.rotary_dim or self.head_dim
        rotated = split_pairs(heads[:, :rotary_dim]).transpose(1, 2).flatten(1, 2)
        return torch.cat([rotated, heads[:, rotary_dim:]], dim=1).flatten(0, 1)


# Makes the parts of one layer, from the prefixes of their names and of ours.
MakeParts = Callable[[ModelConfig, str, str], Iterator[Part]]


def grouped_query_parts(config: ModelConfig, theirs: str, ours: str, *, halves: bool = True) -> Iterator[Part]:
    """The parts of attention. Queries, keys and values are rows of one matrix of ours.

    halves: whether theirs pairs the halves of a head in rotary positions; False if it pairs neighbours, as we do.
    """
    head_dim = config.head_width
    order: dict[str, Any] = {"head_dim": head_dim, "rotary_dim": config.rotary_dim} if halves else {}
    kinds: dict[str, tuple[int, ...]] = {"weight": (config.hidden,)} | ({"bias": ()} if config.qkv_bias else {})
    for kind, width in kinds.items():
        first_row = 0
        for name, heads in (
            ("q_proj", config.num_heads),
            ("k_proj", config.num_kv_heads),
            ("v_proj", config.num_kv_heads),
        ):
            shape, row_order = (heads * head_dim, *width), {} if name == "v_proj" else order
            yield Part(f"{theirs}.{name}.{kind}", f"{ours}.qkv_proj.{kind}", shape, first_row, **row_order)
            first_row += shape[0]
    if config.query_key_norm != "none":
        for name, norm, heads in (("q", "query", config.num_heads), ("k", "key", config.num_kv_heads)):
            rows = head_dim * (1 if config.query_key_norm == "head" else heads)
            yield Part(f"{theirs}.{name}_norm.weight", f"{ours}.{norm}_norm.weight", (rows,), **order)
    shape = (config.hidden, config.num_heads * head_dim)
    if config.attention_gate:
        yield Part(f"{theirs}.gate_proj.weight", f"{ours}.gate_proj.weight", shape[::-1])
    yield Part(f"{theirs}.o_proj.weight", f"{ours}.out_proj.weight", shape)
    if config.out_bias:
        yield Part(f"{theirs}.o_proj.bias", f"{ours}.out_proj.bias", (config.hidden,))
    if config.attention_sinks:
        yield Part(f"{theirs}.sinks", f"{ours}.sinks", (config.num_heads,))


def feed_forward_parts(config: ModelConfig, theirs: str, ours: str, ffn_hidden: int) -> Iterator[Part]:
    """A dense feed-forward or the shared experts."""
    for name in ("gate_proj", "up_proj"):
        yield Part(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (ffn_hidden, config.hidden))
    yield Part(f"{theirs}.down_proj.weight", f"{ours}.down_proj.weight", (config.hidden, ffn_hidden))


@dataclass(frozen=True, kw_only=True)
class MoEParts:
    """The tensors of a MoE layer, by the names that the family has in its files.

    block: name of the layer. gate: of the router. bias: of the selection bias, which has bias_axes axes; empty where
    the family has none. shared: of the shared experts. projections: of a routed expert's gate, up and down.
    has_stacks: whether one tensor holds all experts of a layer.
    """

    block: str = "mlp"
    gate: str = "gate"
    bias: str = ""
    bias_axes: int = 1
    shared: str = "shared_experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    has_stacks: ClassVar[bool] = False

    def __call__(self, config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
        """The parts of one layer. theirs, ours: prefixes of their names and of ours."""
        moe, theirs = config.moe, f"{theirs}.{self.block}"
        if self.bias:
            shape = (1,) * (self.bias_axes - 1) + (moe.num_experts,)
            yield Part(f"{theirs}.{self.bias}", f"{ours}.router.expert_bias_E", shape)
        yield Part(f"{theirs}.{self.gate}.weight", f"{ours}.router.weight", (moe.num_experts, config.hidden))
        if moe.gate_bias:
            yield Part(f"{theirs}.{self.gate}.bias", f"{ours}.router.gate_bias", (moe.num_experts,))
        yield from self._experts(config, theirs, ours)
        if moe.num_shared_experts:
            shared = moe.ffn_hidden * moe.num_shared_experts
            yield from feed_forward_parts(config, f"{theirs}.{self.shared}", f"{ours}.shared_experts", shared)
        if moe.shared_gate:
            gate = f"{ours}.shared_experts.token_gate.weight"
            yield Part(f"{theirs}.{self.shared}_gate.weight", gate, (1, config.hidden))

    def _experts(self, config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
        """The routed experts, whose gate and up projections are one matrix of ours."""
        ffn_hidden = config.moe.ffn_hidden
        gate, up, down = self.projections
        for expert_id in range(config.moe.num_experts):
            expert, target = f"{theirs}.experts.{expert_id}", f"{ours}.experts.{expert_id}"
            inner = (ffn_hidden, config.hidden)
            yield Part(f"{expert}.{gate}.weight", f"{target}.gate_up_proj", inner)
            yield Part(f"{expert}.{up}.weight", f"{target}.gate_up_proj", inner, ffn_hidden)
            yield Part(f"{expert}.{down}.weight", f"{target}.down_proj", inner[::-1])


NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Family:
    """A kind of model of Hugging Face, chosen by `model_type` and `architectures` of its config.json.

    read_config: makes our settings from theirs; max_seq_len is then the longest that the model supports.
    moe_parts, attention_parts: make the parts of one layer.
    mtp_parts: makes the parts that the multi-token-prediction layer has besides those of any layer; None for a family
        without such a layer.
    other_architectures: further names of the architecture for the same model.
    prefix: of all names, where the model is a part of a larger one, whose other tensors are kept as they are.
    left_out: prefix of tensors that import ignores, as transformers does; {num_layers} is filled in. Empty for none.
    norms: our names of the norms of a layer, by theirs.
    modules: names of modules in transformers 5, by their names in the files, where they differ.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Settings], ModelConfig]
    moe_parts: MoEParts
    attention_parts: MakeParts = grouped_query_parts
    mtp_parts: MakeParts | None = None
    other_architectures: tuple[str, ...] = ()
    prefix: str = ""
    left_out: str = ""
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    modules: Mapping[str, str] = field(default_factory=dict)

    def is_stack(self, name: str) -> bool:
        """Whether a tensor of the files holds all experts of a layer."""
        return self.moe_parts.has_stacks and f".{self.moe_parts.block}.experts." in name

    @property
    def has_bias(self) -> bool:
        """Whether its routers have a selection bias."""
        return bool(self.moe_parts.bias)

    def parts(self, config: ModelConfig) -> Iterator[Part]:
        """All parts of a checkpoint, in the order in which the model uses their tensors."""
        parts = self._parts(config)
        return (replace(part, name=self.prefix + part.name) for part in parts) if self.prefix else parts

    def _parts(self, config: ModelConfig) -> Iterator[Part]:
        vocabulary, width = (config.vocab_size, config.hidden), (config.hidden,)
        yield Part("model.embed_tokens.weight", "token_embedding.weight", vocabulary)
        for index in range(config.num_layers):
            yield from self._layer(config, index, f"layers.{index}")
        yield Part("model.norm.weight", "norm.weight", width)
        if not config.tie_embeddings:
            yield Part("lm_head.weight", "lm_head.weight", vocabulary)
        if config.num_mtp_layers and self.mtp_parts is not None:
            # In the files it has the index after the last layer.
            yield from self.mtp_parts(config, f"model.layers.{config.num_layers}", "mtp")
            yield from self._layer(config, config.num_layers, "mtp.block")

    def _layer(self, config: ModelConfig, index: int, ours: str) -> Iterator[Part]:
        theirs, width = f"model.layers.{index}", (config.hidden,)
        for name, norm in self.norms.items():
            yield Part(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight", width)
        yield from self.attention_parts(config, f"{theirs}.self_attn", f"{ours}.attention")
        if index < config.num_dense_layers:
            yield from feed_forward_parts(config, f"{theirs}.mlp", f"{ours}.ffn", config.dense_ffn_hidden)
        else:
            yield from self.moe_parts(config, theirs, f"{ours}.moe")
