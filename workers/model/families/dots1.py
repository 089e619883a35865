"""dots.llm1 (arXiv 2506.05767): the router of DeepSeek-V3, grouped queries normalised by head."""

from workers.model.families.base import Family
from workers.model.families.deepseek_v3 import MOE
from workers.model.families.settings import Settings
from workers.model.families.shapes import check_full_attention, decoder_shape, grouped_query_shape, v3_router
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Dots1Config."""
    settings.expect("attention_bias", False)
    check_full_attention(settings)
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e4, norm_eps=1e-6),
        **grouped_query_shape(settings),
        num_dense_layers=settings.integer("first_k_dense_replace", default=0),
        query_key_norm="head",
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=v3_router(settings, num_shared=None, normalize=False),
    )


FAMILY = Family("dots1", "Dots1ForCausalLM", read_config, MOE)
