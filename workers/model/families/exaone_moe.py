"""K-EXAONE: the router of DeepSeek-V3, queries and keys normalised by head, a window in most layers.

Layers without the window do not rotate queries and keys.
"""

from workers.model.families.base import Family, MoEParts
from workers.model.families.settings import Settings
from workers.model.families.shapes import (
    decoder_shape,
    dense_by_type,
    grouped_query_shape,
    v3_router,
    window_shape,
)
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of an ExaoneMoeConfig."""
    return ModelConfig(
        **decoder_shape(settings, rope_theta=1e4, norm_eps=1e-5),
        **grouped_query_shape(settings),
        **window_shape(settings, default=4096, every=_every(settings)),
        rotate_full_attention=False,
        num_dense_layers=dense_by_type(settings, default=settings.integer("first_k_dense_replace", default=1)),
        query_key_norm="head",
        dense_ffn_hidden=settings.integer("intermediate_size"),
        moe=v3_router(settings, route_scale=2.5),
    )


def _every(settings: Settings) -> int:
    """Every how many layers one has full attention, by sliding_window_pattern: a number, or letters such as LLLG.

    L stands for a layer with a window, G for one with full attention.
    """
    pattern = settings.values.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern == "L" * (len(pattern) - 1) + "G":
        return len(pattern)
    return settings.integer("sliding_window_pattern", default=4, minimum=1)


MOE = MoEParts(bias="e_score_correction_bias")
FAMILY = Family("exaone_moe", "ExaoneMoeForCausalLM", read_config, MOE, left_out="mtp.")
