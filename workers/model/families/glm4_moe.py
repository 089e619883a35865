"""GLM-4.5 to 4.7 (arXiv 2508.06471): DeepSeek-V3's router and MTP layer, grouped queries, half of a head rotated."""

from workers.model.families.base import Family
from workers.model.families.deepseek_v3 import MOE, mtp_parts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape, v3_router
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Glm4MoeConfig."""
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e4, norm_eps=1e-5),
        **grouped_query_shape(settings, narrow=False),
        num_dense_layers=settings.integer("first_k_dense_replace", default=1),
        qkv_bias=settings.flag("attention_bias", default=False),
        partial_rotary_factor=settings.partial_rotary_factor(0.5),
        query_key_norm="head" if settings.flag("use_qk_norm", default=False) else "none",
        dense_ffn_hidden=settings.integer("intermediate_size"),
        num_mtp_layers=settings.integer("num_nextn_predict_layers", "num_mtp_layers", default=1),
        moe=v3_router(settings),
    )


FAMILY = Family("glm4_moe", "Glm4MoeForCausalLM", read_config, MOE, mtp_parts=mtp_parts)
