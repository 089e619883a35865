"""Mixtral (arXiv 2401.04088): grouped queries, softmax router whose weights are normalised, no shared expert."""

from collections.abc import Iterator

from dispatch.errors import InvalidValue
from dispatch.layer import MoEConfig
from workers.families.base import Family, Part, expert_parts, grouped_query_parts
from workers.families.settings import MOST_LAYERS, MOST_POSITIONS, Settings
from workers.model import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a MixtralConfig."""
    settings.expect("hidden_act", "silu")
    max_seq_len = settings.whole("max_position_embeddings", most=MOST_POSITIONS)
    window = settings.whole("sliding_window", default=max_seq_len, null=max_seq_len, most=MOST_POSITIONS)
    if window < max_seq_len:  # a wider one reaches every token
        raise InvalidValue(
            f"{settings.where}: sliding_window is {window}, and only null or at least max_position_embeddings "
            f"({max_seq_len}) is supported"
        )
    hidden, num_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads", least=1)
    return ModelConfig(
        vocab_size=settings.whole("vocab_size"),
        hidden=hidden,
        num_layers=settings.whole("num_hidden_layers", most=MOST_LAYERS),
        num_dense_layers=0,
        num_heads=num_heads,
        num_kv_heads=settings.whole("num_key_value_heads", default=8, null=num_heads),
        head_dim=settings.whole("head_dim", default=hidden // num_heads, null=hidden // num_heads),
        max_seq_len=max_seq_len,
        rope_theta=settings.rope_theta(1e6),
        yarn=settings.yarn(scales_scores=False),
        norm_eps=settings.number("rms_norm_eps", default=1e-5),
        tie_embeddings=settings.flag("tie_word_embeddings", default=False),
        moe=MoEConfig(
            num_experts=settings.whole("num_local_experts", "num_experts"),
            top_k=settings.whole("num_experts_per_tok"),
            ffn_hidden=settings.whole("intermediate_size"),
            num_shared_experts=0,
            score="softmax",
        ),
    )


def moe_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The gate and the experts of one layer."""
    return expert_parts(config, f"{theirs}.block_sparse_moe", ours, ("w1", "w3", "w2"))


FAMILY = Family("mixtral", "MixtralForCausalLM", read_config, grouped_query_parts, moe_parts)
