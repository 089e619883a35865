"""Hy3: the router of DeepSeek-V3 under names of its own, grouped queries normalised by head."""

from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, dense_by_type, grouped_query_shape, v3_router
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a HYV3Config."""
    for name in ("attention_bias", "mlp_bias"):
        settings.expect(name, False)
    for name in ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        settings.expect(name, True)
    return ModelConfig(
        **decoder_shape(settings, rope_theta=11_158_840.0, norm_eps=1e-5),
        **grouped_query_shape(settings, narrow=False),
        num_dense_layers=dense_by_type(settings, default=1),
        query_key_norm="head",
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=v3_router(settings, route_scale=2.826),
    )


MOE = MoEParts(gate="router.gate", bias="expert_bias", shared="shared_mlp")
FAMILY = Family(
    "hy_v3",
    "HYV3ForCausalLM",
    read_config,
    MOE,
    left_out="model.layers.{num_layers}.",
    modules={"shared_mlp": "shared_experts"},
)
