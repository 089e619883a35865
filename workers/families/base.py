"""What a model family is: how its config.json becomes a ModelConfig, and where each of its tensors lies in our state.

Names of our side are canonical ones (`workers.state`) without their section.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from workers.families.settings import Settings
from workers.model import ModelConfig


@dataclass(frozen=True)
class Part:
    """One tensor of a Hugging Face checkpoint: the rows `first_row` and following of one of our tensors, bit for bit.

    Hugging Face turns the two halves of a head against each other, we turn neighbours (`workers.attention.rotate`).
    The scores are the same if the rows of queries and keys are in the other order, which is what `head_dim` is for.

    head_dim: rows of a head, which are stored as two halves; 0 where rows keep their order.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    first_row: int = 0
    head_dim: int = 0

    def rows_of(self, target: Tensor) -> Tensor:
        """The rows of our tensor that this is, a view."""
        return target.narrow(0, self.first_row, self.shape[0])

    def to_ours(self, rows: Tensor) -> Tensor:
        """Whole heads from their order to ours."""
        return self._reorder(rows, (2, self.head_dim // 2))

    def to_theirs(self, rows: Tensor) -> Tensor:
        """Whole heads from our order to theirs."""
        return self._reorder(rows, (self.head_dim // 2, 2))

    def _reorder(self, rows: Tensor, sizes: tuple[int, int]) -> Tensor:
        return rows.unflatten(0, (-1, *sizes)).transpose(1, 2).flatten(0, 2) if self.head_dim else rows


@dataclass(frozen=True)
class Family:
    """A kind of model of Hugging Face, chosen by `model_type` and `architectures[0]` of its config.json.

    read_config: our settings from theirs; max_seq_len is all that the model knows.
    layer_parts: the parts of attention and feed-forward of one layer, given its index and the prefix of its names.
    has_bias: whether its routers have a selection bias.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Settings], ModelConfig]
    layer_parts: Callable[[ModelConfig, int, str], Iterator[Part]]
    has_bias: bool = False

    def parts(self, config: ModelConfig) -> Iterator[Part]:
        """All tensors of a checkpoint, in the order in which they are used."""
        vocabulary, width = (config.vocab_size, config.hidden), (config.hidden,)
        yield Part("model.embed_tokens.weight", "token_embedding.weight", vocabulary)
        for index in range(config.num_layers):
            theirs, ours = f"model.layers.{index}", f"layers.{index}"
            yield Part(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", width)
            yield Part(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight", width)
            yield from self.layer_parts(config, index, theirs)
        yield Part("model.norm.weight", "norm.weight", width)
        if not config.tie_embeddings:
            yield Part("lm_head.weight", "lm_head.weight", vocabulary)


def grouped_query_parts(config: ModelConfig, index: int, layer: str) -> Iterator[Part]:
    """Queries, keys and values, which are rows of one matrix of ours, their norms, and the output."""
    head_dim, target = config.rotary_dim, f"layers.{index}.attention"
    first_row = 0
    for name, heads, turns in (
        ("q_proj", config.num_heads, True),
        ("k_proj", config.num_kv_heads, True),
        ("v_proj", config.num_kv_heads, False),
    ):
        shape, halves = (heads * head_dim, config.hidden), head_dim if turns else 0
        yield Part(f"{layer}.self_attn.{name}.weight", f"{target}.qkv_proj.weight", shape, first_row, halves)
        first_row += shape[0]
    if config.query_key_norm != "none":
        for name, ours, heads in (("q", "query", config.num_heads), ("k", "key", config.num_kv_heads)):
            width = head_dim * (1 if config.query_key_norm == "head" else heads)
            theirs = f"{layer}.self_attn.{name}_norm.weight"
            yield Part(theirs, f"{target}.{ours}_norm.weight", (width,), head_dim=head_dim)
    shape = (config.hidden, config.num_heads * head_dim)
    yield Part(f"{layer}.self_attn.o_proj.weight", f"{target}.out_proj.weight", shape)


def feed_forward_parts(config: ModelConfig, theirs: str, ours: str, ffn_hidden: int) -> Iterator[Part]:
    """A dense feed-forward or the shared experts."""
    for name in ("gate_proj", "up_proj"):
        yield Part(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (ffn_hidden, config.hidden))
    yield Part(f"{theirs}.down_proj.weight", f"{ours}.down_proj.weight", (config.hidden, ffn_hidden))


def expert_parts(
    config: ModelConfig, theirs: str, ours: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Part]:
    """The gate of a MoE layer and its routed experts, whose gate and up projections are one matrix of ours."""
    moe = config.moe
    yield Part(f"{theirs}.gate.weight", f"{ours}.router.weight", (moe.num_experts, config.hidden))
    inner = (moe.ffn_hidden, config.hidden)
    gate, up, down = names
    for expert_id in range(moe.num_experts):
        expert, target = f"{theirs}.experts.{expert_id}", f"{ours}.experts.{expert_id}"
        yield Part(f"{expert}.{gate}.weight", f"{target}.gate_up_proj", inner)
        yield Part(f"{expert}.{up}.weight", f"{target}.gate_up_proj", inner, moe.ffn_hidden)
        yield Part(f"{expert}.{down}.weight", f"{target}.down_proj", inner[::-1])
