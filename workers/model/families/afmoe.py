"""Trinity (AFMoE): sigmoid router with a selection bias, gated attention, RMSNorm before and after each sublayer.

Most layers have a window; those without it do not rotate queries and keys.
"""

from dispatch.config import MoEConfig
from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape, window_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of an AfmoeConfig."""
    settings.expect("attention_bias", False)
    settings.expect("score_func", "sigmoid")
    settings.expect("route_norm", True)
    settings.expect("num_expert_groups", 1)
    shape = decoder_shape(settings, rope_theta=1e4, norm_eps=1e-5)
    every = settings.integer("global_attn_every_n_layers", default=4, minimum=1)
    return ModelConfig(
        **shape,
        **grouped_query_shape(settings, narrow=False),
        **window_shape(settings, default=1024, every=every),
        rotate_full_attention=False,
        attention_gate=True,
        post_norms=True,
        embedding_scale=shape["hidden"] ** 0.5 if settings.flag("mup_enabled", default=False) else 1.0,
        num_dense_layers=settings.integer("num_dense_layers", default=1, null=0),
        query_key_norm="head",
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=MoEConfig(
            num_experts=settings.integer("num_experts", "num_local_experts"),
            top_k=settings.integer("num_experts_per_tok"),
            ffn_hidden=settings.integer("moe_intermediate_size"),
            num_shared_experts=settings.integer("num_shared_experts", default=2),
            score="sigmoid",
            route_scale=settings.number("route_scale", default=1.0),
        ),
    )


NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_mlp_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffn_norm",
}
MOE = MoEParts(gate="router.gate", bias="expert_bias")
FAMILY = Family("afmoe", "AfmoeForCausalLM", read_config, MOE, norms=NORMS)
