"""Solar Open: GLM-4.5's router and attention without dense layers; the whole head is rotated."""

from workers.model.families.base import Family
from workers.model.families.deepseek_v3 import MOE
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape, v3_router
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a SolarOpenConfig."""
    settings.expect("first_k_dense_replace", 0)
    settings.expect("use_qk_norm", False)
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e6, norm_eps=1e-5),
        **grouped_query_shape(settings, narrow=False),
        num_dense_layers=0,
        qkv_bias=settings.flag("attention_bias", default=False),
        partial_rotary_factor=settings.partial_rotary_factor(1.0),
        moe=v3_router(settings),
    )


FAMILY = Family("solar_open", "SolarOpenForCausalLM", read_config, MOE)
