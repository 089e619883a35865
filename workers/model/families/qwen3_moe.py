"""Qwen3-MoE (arXiv 2505.09388): queries and keys normalised by head, softmax router, optional first dense layers."""

from dispatch.config import MoEConfig
from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, first_dense, grouped_query_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Qwen3MoeConfig."""
    settings.expect("attention_bias", False)
    settings.expect("use_sliding_window", False)
    settings.expect("decoder_sparse_step", 1)
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e4, norm_eps=1e-6),
        **grouped_query_shape(settings),
        num_dense_layers=first_dense(settings, settings.values.get("mlp_only_layers") or [], "mlp_only_layers"),
        query_key_norm="head",
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=MoEConfig(
            num_experts=settings.integer("num_experts", "num_local_experts"),
            top_k=settings.integer("num_experts_per_tok"),
            ffn_hidden=settings.integer("moe_intermediate_size"),
            num_shared_experts=0,
            score="softmax",
            normalize_weights=settings.flag("norm_topk_prob", default=False),
        ),
    )


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_config, MoEParts())
