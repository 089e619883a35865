"""Mixtral (arXiv 2401.04088): grouped queries, softmax router whose weights are normalised, no shared expert."""

from dispatch.config import MoEConfig
from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import MAX_POSITIONS, Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a MixtralConfig."""
    shape = decoder_shape(settings, rope_theta=1e6, norm_eps=1e-5)
    max_seq_len = shape["max_seq_len"]
    window = settings.integer("sliding_window", default=max_seq_len, null=max_seq_len, maximum=MAX_POSITIONS)
    return ModelConfig(
        **shape,
        sliding_window=window if window < max_seq_len else 0,  # a wider one reaches every token
        **grouped_query_shape(settings),
        num_dense_layers=0,
        moe=MoEConfig(
            num_experts=settings.integer("num_local_experts", "num_experts"),
            top_k=settings.integer("num_experts_per_tok"),
            ffn_hidden=settings.integer("intermediate_size"),
            num_shared_experts=0,
            score="softmax",
        ),
    )


MOE = MoEParts(block="block_sparse_moe", projections=("w1", "w3", "w2"))
FAMILY = Family("mixtral", "MixtralForCausalLM", read_config, MOE)
