"""DeepSeek-V3 (arXiv 2412.19437): latent attention, sigmoid router with a selection bias, groups, shared experts."""

from collections.abc import Iterator

from dispatch.layer import MoEConfig
from workers.attention import LatentConfig
from workers.families.base import Family, Part, expert_parts, feed_forward_parts
from workers.families.settings import MOST_LAYERS, MOST_POSITIONS, Settings
from workers.model import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a DeepseekV3Config."""
    settings.expect("attention_bias", False)
    settings.expect("hidden_act", "silu")
    settings.expect("scoring_func", "sigmoid")
    settings.expect("topk_method", "noaux_tc")
    settings.expect("moe_layer_freq", 1)
    settings.expect("rope_interleave", True, None)
    num_groups = settings.whole("n_group", default=8, least=1)
    return ModelConfig(
        vocab_size=settings.whole("vocab_size"),
        hidden=settings.whole("hidden_size"),
        num_layers=settings.whole("num_hidden_layers", most=MOST_LAYERS),
        num_dense_layers=settings.whole("first_k_dense_replace"),
        num_heads=settings.whole("num_attention_heads", least=1),
        num_kv_heads=settings.whole("num_attention_heads", least=1),
        attention="latent",
        latent=LatentConfig(
            query_rank=settings.whole("q_lora_rank", default=1536, null=0),
            kv_rank=settings.whole("kv_lora_rank"),
            nope_dim=settings.whole("qk_nope_head_dim"),
            rope_dim=settings.whole("qk_rope_head_dim"),
            value_dim=settings.whole("v_head_dim"),
        ),
        dense_ffn_hidden=settings.whole("intermediate_size"),
        num_mtp_layers=settings.whole("num_nextn_predict_layers", "num_mtp_layers", default=1),
        max_seq_len=settings.whole("max_position_embeddings", most=MOST_POSITIONS),
        rope_theta=settings.rope_theta(1e4),
        yarn=settings.yarn(scales_scores=True),
        norm_eps=settings.number("rms_norm_eps", default=1e-6),
        tie_embeddings=settings.flag("tie_word_embeddings", default=False),
        moe=MoEConfig(
            num_experts=settings.whole("n_routed_experts", "num_local_experts"),
            top_k=settings.whole("num_experts_per_tok"),
            ffn_hidden=settings.whole("moe_intermediate_size"),
            num_shared_experts=settings.whole("n_shared_experts", default=1),
            score="sigmoid",
            num_groups=num_groups,
            groups_kept=settings.whole("topk_group", default=4),
            scores_per_group=2,  # of DeepSeek's own code; the paper's top_k / groups_kept is 2 as well at full size
            normalize_weights=settings.flag("norm_topk_prob", default=True),
            route_scale=settings.number("routed_scaling_factor", default=2.5),
        ),
    )


def moe_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """The gate with its bias, the experts and the shared experts of one layer."""
    moe = config.moe
    yield Part(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.router.expert_bias_E", (moe.num_experts,))
    yield from expert_parts(config, f"{theirs}.mlp", ours)
    if moe.num_shared_experts:
        shared = moe.ffn_hidden * moe.num_shared_experts
        yield from feed_forward_parts(config, f"{theirs}.mlp.shared_experts", f"{ours}.shared_experts", shared)


def mtp_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """What the multi-token-prediction layer adds to a layer; it brings copies of the shared embedding and output."""
    width, vocabulary = (config.hidden,), (config.vocab_size, config.hidden)
    yield Part(f"{theirs}.embed_tokens.weight", "token_embedding.weight", vocabulary, is_copy=True)
    yield Part(f"{theirs}.enorm.weight", f"{ours}.token_norm.weight", width)
    yield Part(f"{theirs}.hnorm.weight", f"{ours}.hidden_norm.weight", width)
    yield Part(f"{theirs}.eh_proj.weight", f"{ours}.proj.weight", (config.hidden, 2 * config.hidden))
    yield Part(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight", width)
    head = "token_embedding.weight" if config.tie_embeddings else "lm_head.weight"
    yield Part(f"{theirs}.shared_head.head.weight", head, vocabulary, is_copy=True)


def attention_parts(config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    """Both latents with their norms, what is made of them, and the output."""
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


FAMILY = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", read_config, attention_parts, moe_parts, mtp_parts, has_bias=True
)
