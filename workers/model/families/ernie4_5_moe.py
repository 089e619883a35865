"""ERNIE 4.5: softmax router with a selection bias, shared experts; rotary positions pair neighbours, as ours do."""

from functools import partial

from dispatch.config import MoEConfig
from workers.model.families.base import Family, MoEParts, grouped_query_parts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of an Ernie4_5_MoeConfig."""
    settings.expect("use_bias", False)
    settings.expect("moe_layer_interval", 1)
    shape = decoder_shape(settings, rope_theta=5e5, norm_eps=1e-5, tied=True)
    settings.expect("moe_layer_end_index", -1, shape["num_layers"] - 1)
    return ModelConfig(
        **shape,
        **grouped_query_shape(settings),
        num_dense_layers=settings.integer("moe_layer_start_index", default=1),
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=MoEConfig(
            num_experts=settings.integer("moe_num_experts", "num_experts"),
            top_k=settings.integer("moe_k", "num_experts_per_tok"),
            ffn_hidden=settings.integer("moe_intermediate_size"),
            num_shared_experts=settings.integer("moe_num_shared_experts", default=2, null=0),
            score="softmax",
        ),
    )


MOE = MoEParts(bias="moe_statics.e_score_correction_bias", bias_axes=2)
ATTENTION = partial(grouped_query_parts, halves=False)
FAMILY = Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", read_config, MOE, ATTENTION, left_out="model.mtp_")
