"""OLMoE (arXiv 2409.02060): normalised queries and keys, softmax router whose weights are not normalised by default."""

from dispatch.config import MoEConfig
from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of an OlmoeConfig."""
    settings.expect("attention_bias", False)
    num_heads = settings.integer("num_attention_heads", minimum=1)
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e4, norm_eps=1e-5),
        num_dense_layers=0,
        num_kv_heads=settings.integer("num_key_value_heads", default=num_heads, null=num_heads),
        query_key_norm="all",
        clip_qkv=settings.number("clip_qkv", default=0.0, null=0.0),
        moe=MoEConfig(
            num_experts=settings.integer("num_experts", "num_local_experts"),
            top_k=settings.integer("num_experts_per_tok"),
            ffn_hidden=settings.integer("intermediate_size"),
            num_shared_experts=0,
            score="softmax",
            normalize_weights=settings.flag("norm_topk_prob", default=False),
        ),
    )


FAMILY = Family("olmoe", "OlmoeForCausalLM", read_config, MoEParts())
