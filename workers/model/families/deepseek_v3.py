"""DeepSeek-V3 (arXiv 2412.19437): latent attention, sigmoid router with a selection bias, groups, shared experts."""

from collections.abc import Iterator
from typing import Any

from workers.model.attention import LatentConfig
from workers.model.families.base import Family, MoEParts, Part
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, v3_router
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a DeepseekV3Config."""
    settings.expect("moe_layer_freq", 1)
    return ModelConfig(
        **latent_shape(settings, norm_eps=1e-6, query_rank=1536),
        num_dense_layers=settings.integer("first_k_dense_replace"),
        moe=v3_router(settings, num_groups=8, groups_kept=4, route_scale=2.5),
    )


def latent_shape(settings: Settings, *, norm_eps: float, query_rank: int) -> dict[str, Any]:
    """All settings but those of the experts. norm_eps, query_rank: defaults of the family in transformers."""
    settings.expect("attention_bias", False)
    settings.expect("rope_interleave", True, None)
    shape = decoder_shape(settings, rope_theta=1e4, norm_eps=norm_eps)
    return shape | {
        "num_kv_heads": shape["num_heads"],
        "attention": "latent",
        "latent": LatentConfig(
            query_rank=settings.integer("q_lora_rank", default=query_rank, null=0),
            kv_rank=settings.integer("kv_lora_rank"),
            nope_dim=settings.integer("qk_nope_head_dim"),
            rope_dim=settings.integer("qk_rope_head_dim"),
            value_dim=settings.integer("v_head_dim"),
        ),
        "yarn": settings.yarn(scales_scores=True),
        "dense_ffn_hidden": settings.integer("intermediate_size"),
        "num_mtp_layers": settings.integer("num_nextn_predict_layers", "num_mtp_layers", default=1),
    }


def mtp_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The parts that only the multi-token-prediction layer has, with copies of embedding and output projection."""
    width, vocabulary = (config.hidden,), (config.vocab_size, config.hidden)
    yield Part(f"{theirs}.embed_tokens.weight", "token_embedding.weight", vocabulary, is_copy=True)
    yield Part(f"{theirs}.enorm.weight", f"{ours}.token_norm.weight", width)
    yield Part(f"{theirs}.hnorm.weight", f"{ours}.hidden_norm.weight", width)
    yield Part(f"{theirs}.eh_proj.weight", f"{ours}.proj.weight", (config.hidden, 2 * config.hidden))
    yield Part(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight", width)
    head = "token_embedding.weight" if config.tie_embeddings else "lm_head.weight"
    yield Part(f"{theirs}.shared_head.head.weight", head, vocabulary, is_copy=True)


def attention_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The projections to the latents, their norms, the projections from the latents, and the output projection."""
    sizes, heads, hidden = config.latent, config.num_heads, config.hidden
    query_shape = (heads * (sizes.nope_dim + sizes.rope_dim), sizes.query_rank or hidden)
    if sizes.query_rank:
        yield Part(f"{theirs}.q_a_proj.weight", f"{ours}.query_latent_proj.weight", (sizes.query_rank, hidden))
        yield Part(f"{theirs}.q_a_layernorm.weight", f"{ours}.query_norm.weight", (sizes.query_rank,))
        yield Part(f"{theirs}.q_b_proj.weight", f"{ours}.query_proj.weight", query_shape)
    else:
        yield Part(f"{theirs}.q_proj.weight", f"{ours}.query_proj.weight", query_shape)
    latent_shape = (sizes.kv_rank + sizes.rope_dim, hidden)
    yield Part(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.kv_latent_proj.weight", latent_shape)
    yield Part(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", (sizes.kv_rank,))
    kv_shape = (heads * (sizes.nope_dim + sizes.value_dim), sizes.kv_rank)
    yield Part(f"{theirs}.kv_b_proj.weight", f"{ours}.kv_proj.weight", kv_shape)
    yield Part(f"{theirs}.o_proj.weight", f"{ours}.out_proj.weight", (hidden, heads * sizes.value_dim))


MOE = MoEParts(bias="gate.e_score_correction_bias")
FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", read_config, MOE, attention_parts, mtp_parts)
