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
    is_copy: of what another part is; it may be missing, and where it is there it must be equal.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    first_row: int = 0
    head_dim: int = 0
    is_copy: bool = False

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


PartsOf = Callable[[ModelConfig, str, str], Iterator[Part]]


@dataclass(frozen=True)
class Family:
    """A kind of model of Hugging Face, chosen by `model_type` and `architectures[0]` of its config.json.

    read_config: our settings from theirs; max_seq_len is all that the model knows.
    attention_parts, moe_parts: of one layer, given the prefix of its names and of ours.
    mtp_parts: what a multi-token-prediction layer has besides a layer, given both prefixes; None where there is none.
    has_bias: whether its routers have a selection bias.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Settings], ModelConfig]
    attention_parts: PartsOf
    moe_parts: PartsOf
    mtp_parts: PartsOf | None = None
    has_bias: bool = False

    def parts(self, config: ModelConfig) -> Iterator[Part]:
        """All tensors of a checkpoint, in the order in which they are used."""
        vocabulary, width = (config.vocab_size, config.hidden), (config.hidden,)
        yield Part("model.embed_tokens.weight", "token_embedding.weight", vocabulary)
        for index in range(config.num_layers):
            yield from self._layer(config, index, f"layers.{index}")
        yield Part("model.norm.weight", "norm.weight", width)
        if not config.tie_embeddings:
            yield Part("lm_head.weight", "lm_head.weight", vocabulary)
        if config.num_mtp_layers and self.mtp_parts is not None:
            # It follows the layers in the names of the hub.
            yield from self.mtp_parts(config, f"model.layers.{config.num_layers}", "mtp")
            yield from self._layer(config, config.num_layers, "mtp.block")

    def _layer(self, config: ModelConfig, index: int, ours: str) -> Iterator[Part]:
        theirs, width = f"model.layers.{index}", (config.hidden,)
        yield Part(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", width)
        yield Part(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight", width)
        yield from self.attention_parts(config, f"{theirs}.self_attn", f"{ours}.attention")
        if index < config.num_dense_layers:
            yield from feed_forward_parts(config, f"{theirs}.mlp", f"{ours}.ffn", config.dense_ffn_hidden)
        else:
            yield from self.moe_parts(config, theirs, f"{ours}.moe")


def grouped_query_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """Queries, keys and values, which are rows of one matrix of ours, their norms, and the output."""
    head_dim, first_row = config.rotary_dim, 0
    for name, heads, turns in (
        ("q_proj", config.num_heads, True),
        ("k_proj", config.num_kv_heads, True),
        ("v_proj", config.num_kv_heads, False),
    ):
        shape, halves = (heads * head_dim, config.hidden), head_dim if turns else 0
        yield Part(f"{theirs}.{name}.weight", f"{ours}.qkv_proj.weight", shape, first_row, halves)
        first_row += shape[0]
    if config.query_key_norm != "none":
        for name, norm, heads in (("q", "query", config.num_heads), ("k", "key", config.num_kv_heads)):
            width = head_dim * (1 if config.query_key_norm == "head" else heads)
            yield Part(f"{theirs}.{name}_norm.weight", f"{ours}.{norm}_norm.weight", (width,), head_dim=head_dim)
    shape = (config.hidden, config.num_heads * head_dim)
    yield Part(f"{theirs}.o_proj.weight", f"{ours}.out_proj.weight", shape)


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
