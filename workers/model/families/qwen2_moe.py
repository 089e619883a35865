"""Qwen2-MoE and Qwen1.5-MoE: biases of queries, keys and values, a shared expert under a sigmoid gate."""

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, first_dense, grouped_query_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a Qwen2MoeConfig."""
    settings.expect("use_sliding_window", False)
    settings.expect("decoder_sparse_step", 1)
    ffn_hidden, shared = map(settings.integer, ("moe_intermediate_size", "shared_expert_intermediate_size"))
    if not ffn_hidden or not shared or shared % ffn_hidden:
        raise InvalidValue(
            f"{settings.where}: shared_expert_intermediate_size is {shared}, and only a multiple of "
            f"moe_intermediate_size ({ffn_hidden}) is supported"
        )
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e4, norm_eps=1e-6),
        **grouped_query_shape(settings),
        num_dense_layers=first_dense(settings, settings.values.get("mlp_only_layers") or [], "mlp_only_layers"),
        qkv_bias=settings.flag("qkv_bias", default=True),
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=MoEConfig(
            num_experts=settings.integer("num_experts", "num_local_experts"),
            top_k=settings.integer("num_experts_per_tok"),
            ffn_hidden=ffn_hidden,
            num_shared_experts=shared // ffn_hidden,
            shared_gate=True,
            score="softmax",
            normalize_weights=settings.flag("norm_topk_prob", default=False),
        ),
    )


FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", read_config, MoEParts(shared="shared_expert"))
