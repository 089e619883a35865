"""MiniMax-M2 to M2.7: sigmoid router with a selection bias, normalised queries and keys, half of a head rotated."""

from dispatch.config import MoEConfig
from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a MiniMaxM2Config."""
    settings.expect("scoring_func", "sigmoid")
    settings.expect("use_routing_bias", True)
    settings.expect("use_qk_norm", True)
    settings.expect("qk_norm_type", "per_layer")
    settings.expect("shared_intermediate_size", 0)
    settings.expect("router_jitter_noise", 0.0)
    heads = grouped_query_shape(settings, narrow=False)
    # Files on the hub give the number of rotated dimensions (rotary_dim), those that transformers writes their share.
    rotary_dim = settings.integer("rotary_dim", default=heads["head_dim"], null=heads["head_dim"])
    return ModelConfig(
        **decoder_shape(settings, rope_theta=5e6, norm_eps=1e-6),
        **heads,
        num_dense_layers=0,
        partial_rotary_factor=settings.partial_rotary_factor(rotary_dim / max(1, heads["head_dim"])),
        query_key_norm="all",
        moe=MoEConfig(
            num_experts=settings.integer("num_local_experts", "num_experts"),
            top_k=settings.integer("num_experts_per_tok"),
            ffn_hidden=settings.integer("intermediate_size"),
            num_shared_experts=0,
            score="sigmoid",
        ),
    )


MOE = MoEParts(block="block_sparse_moe", bias="e_score_correction_bias", projections=("w1", "w3", "w2"))
FAMILY = Family("minimax_m2", "MiniMaxM2ForCausalLM", read_config, MOE)
