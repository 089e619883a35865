"""Reads the settings that have the same names in most families' config.json, as arguments of our configs."""

from typing import Any

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from workers.model.families.settings import MAX_LAYERS, MAX_POSITIONS, Settings


def decoder_shape(settings: Settings, *, rope_theta: float, norm_eps: float, tied: bool = False) -> dict[str, Any]:
    """Sizes, rotary angles, norms and embeddings. rope_theta, norm_eps, tied: the family's defaults in transformers."""
    settings.expect("hidden_act", "silu")
    return {
        "vocab_size": settings.integer("vocab_size"),
        "hidden": settings.integer("hidden_size"),
        "num_layers": settings.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_heads": settings.integer("num_attention_heads", minimum=1),
        "max_seq_len": settings.integer("max_position_embeddings", maximum=MAX_POSITIONS),
        "rope_theta": settings.rope_theta(rope_theta),
        "yarn": settings.yarn(scales_scores=False),
        "norm_eps": settings.number("rms_norm_eps", default=norm_eps),
        "tie_embeddings": settings.flag("tie_word_embeddings", default=tied),
    }


def grouped_query_shape(settings: Settings, *, narrow: bool = True) -> dict[str, Any]:
    """Number and width of key heads. narrow: the width is hidden / heads by default; otherwise it must be given."""
    num_heads = settings.integer("num_attention_heads", minimum=1)
    width = settings.integer("hidden_size") // num_heads
    return {
        "num_kv_heads": settings.integer("num_key_value_heads", null=num_heads),
        "head_dim": settings.integer("head_dim", default=width if narrow else None, null=width if narrow else None),
    }


def first_dense(settings: Settings, dense: object, name: str) -> int:
    """The number of dense layers, from the list of their indices, which the setting `name` has.

    Raises InvalidValue unless these are the first layers.
    """
    if not isinstance(dense, list) or set(map(str, dense)) != set(map(str, range(len(dense)))):
        raise InvalidValue(f"{settings.where}: {name} is {dense!r:.60}, and only the first layers can be dense")
    return len(dense)


def dense_by_type(settings: Settings, *, default: int) -> int:
    """The number of dense layers by mlp_layer_types, or `default`. Raises InvalidValue as `first_dense`."""
    types = settings.values.get("mlp_layer_types")
    if types is None:
        return default
    num_layers = settings.integer("num_hidden_layers", maximum=MAX_LAYERS)
    if not isinstance(types, list) or len(types) != num_layers or not {"dense", "sparse"}.issuperset(map(str, types)):
        rule = f"it must have 'dense' or 'sparse' for each of num_hidden_layers ({num_layers})"
        raise InvalidValue(f"{settings.where}: mlp_layer_types is {types!r:.60}; {rule}")
    dense = [index for index, kind in enumerate(types) if kind == "dense"]
    return first_dense(settings, dense, "the list of dense layers in mlp_layer_types")


def check_full_attention(settings: Settings) -> None:
    """Raise InvalidValue if the attention of a layer has a window."""
    num_layers = settings.integer("num_hidden_layers", maximum=MAX_LAYERS)
    # As transformers does where layer_types is missing: layers from max_window_layers on have a window.
    first = settings.integer("max_window_layers", default=num_layers, null=num_layers)
    if not settings.values.get("layer_types") and settings.values.get("sliding_window") is None:
        first = num_layers
    kinds = _layer_types(settings) or [_KINDS[index >= first] for index in range(num_layers)]
    if _KINDS[1] in kinds:
        raise InvalidValue(f"{settings.where}: layer_types has {_KINDS[1]!r}, and only {_KINDS[0]!r} is supported")


_KINDS = ("full_attention", "sliding_attention")


def _layer_types(settings: Settings) -> list[str]:
    """The kind of attention of each layer; empty where config.json does not have it."""
    kinds = settings.values.get("layer_types") or []
    num_layers = settings.integer("num_hidden_layers", maximum=MAX_LAYERS)
    if not isinstance(kinds, list) or any(kind not in _KINDS for kind in kinds) or len(kinds) not in (0, num_layers):
        rule = f"it must have {_KINDS[0]!r} or {_KINDS[1]!r} for each of num_hidden_layers ({num_layers})"
        raise InvalidValue(f"{settings.where}: layer_types is {kinds!r:.60}; {rule}")
    return kinds


def window_shape(settings: Settings, *, default: int, every: int) -> dict[str, Any]:
    """The window, and every how many layers one has no window; both default as in transformers."""
    window = settings.integer("sliding_window", default=default, null=0, maximum=MAX_POSITIONS)
    kinds = _layer_types(settings)
    if kinds:
        every = kinds.index(_KINDS[0]) + 1 if _KINDS[0] in kinds else 0
    expected = [_KINDS[not every or (index + 1) % every != 0] for index in range(len(kinds))]
    if kinds != expected:
        raise InvalidValue(
            f"{settings.where}: layer_types is {kinds!r:.60}, and {_KINDS[0]!r} must return every so many layers"
        )
    return {"sliding_window": window if every != 1 else 0, "full_attention_every": every}


def v3_router(
    settings: Settings,
    *,
    num_groups: int | None = 1,
    groups_kept: int | None = 1,
    num_shared: int | None = 1,
    normalize: bool = True,
    route_scale: float = 1.0,
) -> MoEConfig:
    """A MoE layer with the router of DeepSeek-V3. The arguments are the family's defaults in transformers."""
    settings.expect("scoring_func", "sigmoid", "noaux_tc")  # dots.llm1 has the name of the top-k method here
    settings.expect("topk_method", "noaux_tc")
    return MoEConfig(
        num_experts=settings.integer("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=settings.integer("num_experts_per_tok"),
        ffn_hidden=settings.integer("moe_intermediate_size"),
        num_shared_experts=settings.integer("n_shared_experts", "num_shared_experts", default=num_shared),
        score="sigmoid",
        num_groups=settings.integer("n_group", default=num_groups, minimum=1),
        groups_kept=settings.integer("topk_group", default=groups_kept),
        scores_per_group=2,  # as in DeepSeek's code; the paper's top_k / groups_kept is 2 too for DeepSeek-V3
        normalize_weights=settings.flag("norm_topk_prob", default=normalize),
        route_scale=settings.number("routed_scaling_factor", "router_scaling_factor", default=route_scale),
    )
