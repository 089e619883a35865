"""OLMoE (arXiv 2409.02060): normalised queries and keys, softmax router whose weights are as they are."""

from collections.abc import Iterator

from dispatch.layer import MoEConfig
from workers.families.base import Family, Part, expert_parts, grouped_query_parts
from workers.families.settings import MOST_LAYERS, MOST_POSITIONS, Settings
from workers.model import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of an OlmoeConfig."""
    settings.expect("attention_bias", False)
    settings.expect("hidden_act", "silu")
    num_heads = settings.whole("num_attention_heads", least=1)
    return ModelConfig(
        vocab_size=settings.whole("vocab_size"),
        hidden=settings.whole("hidden_size"),
        num_layers=settings.whole("num_hidden_layers", most=MOST_LAYERS),
        num_dense_layers=0,
        num_heads=num_heads,
        num_kv_heads=settings.whole("num_key_value_heads", default=num_heads, null=num_heads),
        query_key_norm="all",
        clip_qkv=settings.number("clip_qkv", default=0.0, null=0.0),
        max_seq_len=settings.whole("max_position_embeddings", most=MOST_POSITIONS),
        rope_theta=settings.rope_theta(1e4),
        yarn=settings.yarn(scales_scores=False),
        norm_eps=settings.number("rms_norm_eps", default=1e-5),
        tie_embeddings=settings.flag("tie_word_embeddings", default=False),
        moe=MoEConfig(
            num_experts=settings.whole("num_experts", "num_local_experts"),
            top_k=settings.whole("num_experts_per_tok"),
            ffn_hidden=settings.whole("intermediate_size"),
            num_shared_experts=0,
            score="softmax",
            normalize_weights=settings.flag("norm_topk_prob", default=False),
        ),
    )


def moe_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The gate and the experts of one layer."""
    return expert_parts(config, f"{theirs}.mlp", ours)


FAMILY = Family("olmoe", "OlmoeForCausalLM", read_config, grouped_query_parts, moe_parts)
