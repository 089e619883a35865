"""Qwen3-MoE (arXiv 2505.09388): queries and keys normalised by head, softmax router, optional first dense layers."""

from collections.abc import Iterator

from dispatch.errors import InvalidValue
from dispatch.layer import MoEConfig
from workers.families.base import Family, Part, expert_parts, grouped_query_parts
from workers.families.settings import MOST_LAYERS, MOST_POSITIONS, Settings
from workers.model import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Qwen3MoeConfig."""
    settings.expect("attention_bias", False)
    settings.expect("hidden_act", "silu")
    settings.expect("use_sliding_window", False)
    settings.expect("decoder_sparse_step", 1)
    dense = settings.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or set(map(str, dense)) != set(map(str, range(len(dense)))):
        raise InvalidValue(
            f"{settings.where}: mlp_only_layers is {dense!r:.60}, and only the first layers can be dense"
        )
    hidden, num_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads", least=1)
    return ModelConfig(
        vocab_size=settings.whole("vocab_size"),
        hidden=hidden,
        num_layers=settings.whole("num_hidden_layers", most=MOST_LAYERS),
        num_dense_layers=len(dense),
        num_heads=num_heads,
        num_kv_heads=settings.whole("num_key_value_heads"),
        head_dim=settings.whole("head_dim", default=hidden // num_heads, null=hidden // num_heads),
        query_key_norm="head",
        dense_ffn_hidden=settings.whole("intermediate_size"),
        max_seq_len=settings.whole("max_position_embeddings", most=MOST_POSITIONS),
        rope_theta=settings.rope_theta(1e4),
        yarn=settings.yarn(scales_scores=False),
        norm_eps=settings.number("rms_norm_eps", default=1e-6),
        tie_embeddings=settings.flag("tie_word_embeddings", default=False),
        moe=MoEConfig(
            num_experts=settings.whole("num_experts", "num_local_experts"),
            top_k=settings.whole("num_experts_per_tok"),
            ffn_hidden=settings.whole("moe_intermediate_size"),
            num_shared_experts=0,
            score="softmax",
            normalize_weights=settings.flag("norm_topk_prob", default=False),
        ),
    )


def moe_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The gate and the experts of one layer."""
    return expert_parts(config, f"{theirs}.mlp", ours)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_config, grouped_query_parts, moe_parts)
