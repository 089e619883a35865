"""GLM-4.7-Flash: latent attention and the router of DeepSeek-V3, with a list of which layers are dense."""

from workers.model.families.base import Family
from workers.model.families.deepseek_v3 import MOE, attention_parts, latent_shape, mtp_parts
from workers.model.families.settings import Settings
from workers.model.families.shapes import dense_by_type, v3_router
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Glm4MoeLiteConfig."""
    return ModelConfig(
        **latent_shape(settings, norm_eps=1e-5, query_rank=768),
        num_dense_layers=dense_by_type(settings, default=1),
        moe=v3_router(settings, route_scale=1.8),
    )


FAMILY = Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", read_config, MOE, attention_parts, mtp_parts)
