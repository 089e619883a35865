"""Tiny random models that transformers makes, and what they compute: the reference of every family."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

VOCAB_SIZE = 61
STACK = re.compile(r"\.experts\.[a-z]")  # and not a number
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 5,
    "n_group": 8,
    "topk_group": 3,  # 5 / 3 experts of a group: not the 2 of the full size
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
# Settings of the hub's config.json with smaller sizes. Each that real models have occurs: YaRN, tied embeddings,
# clipping, biases, norms, few key heads, wide heads.
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_DEEPSEEK,
        "rope_parameters": {**_YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "kimi_k25": {
        "text_config": {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "patch_size": 2,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        "projection_hidden_size": 16,
        "tie_word_embeddings": False,
    },
    "deepseek_v3 without a query latent": {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
    },
    "glm4_moe without norms": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": False,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "rope_theta": 1000000,
        "partial_rotary_factor": 1.0,
    },
    "minimax_m2": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rotary_dim": 8,
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
        "rope_theta": 5000000,
    },
    "qwen2_moe": {
        "num_key_value_heads": 4,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "num_experts": 10,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
    },
    "dots1": {
        "num_key_value_heads": 4,
        "head_dim": 12,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "noaux_tc",
        "sliding_window": None,
        "rope_theta": 10000000,
    },
    "hy_v3": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-5,
        "qk_norm": True,
        "route_norm": True,
        "moe_router_use_sigmoid": True,
        "moe_router_enable_expert_bias": True,
        "router_scaling_factor": 2.826,
    },
    "afmoe": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_experts_per_tok": 3,
        "num_dense_layers": 1,
        "global_attn_every_n_layers": 2,
        "sliding_window": 3,
        "mup_enabled": True,
        "num_expert_groups": 1,
        "rms_norm_eps": 1e-5,
        "route_norm": True,
        "route_scale": 2.826,
        "score_func": "sigmoid",
    },
    "exaone_moe": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "sliding_window": 3,
        "sliding_window_pattern": 2,  # LLLG at full size
    },
    "solar_open": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 0,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_YARN, "rope_theta": 1e6},
        "use_qk_norm": False,
    },
    "ernie4_5_moe": {
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_k": 3,
        "moe_layer_start_index": 1,
        "moe_use_aux_free": True,
        "rope_theta": 500000,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rope_parameters": {**_YARN, "rope_theta": 1e6},
    },
    "mixtral": {
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "sliding_window": 3,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 32,  # whole blocks of MXFP4
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "attention_bias": True,
        "sliding_window": 3,  # in every second layer
        "swiglu_limit": 0.8,  # 7 at full size, which numbers as small as these would not reach
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_YARN, "rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "olmoe": {
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "clip_qkv": 1.0,
    },
}


class Widened(TorchFunctionMode):
    """float64 wherever transformers asks for float32: its norms, its router and its angles round to fp32 otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def make_model(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model of CONFIGS whose norms and biases are random too, biases of both signs and large enough to matter."""
    config = AutoConfig.for_model(name.split()[0], **_settings(name, overrides))
    torch.manual_seed(sum(name.encode()))
    config.get_text_config()._experts_implementation = "eager"  # their grouped matmul knows no float64
    model = auto_class(name).from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor_name.endswith(("e_score_correction_bias", "expert_bias")):
                # Exact in fp32, which is how our side keeps a bias whatever the model's dtype is.
                tensor.copy_(torch.randn(tensor.shape, dtype=torch.float32) * 0.3 - 0.1)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) * (tensor.shape[-1] ** -0.5))
    return model


def _settings(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Of a model of CONFIGS; sizes are those of its language model, where that is a part."""
    if "text_config" not in CONFIGS[name]:
        return {**_COMMON, **CONFIGS[name], **overrides}
    text = {"model_type": "deepseek_v3", **_COMMON, **CONFIGS[name]["text_config"], **overrides}
    return {**CONFIGS[name], "text_config": text}


def auto_class(name: str) -> Any:
    """What transformers loads a model of CONFIGS by."""
    return AutoModelForImageTextToText if "text_config" in CONFIGS[name] else AutoModelForCausalLM


def text_settings(name: str) -> dict[str, Any]:
    """The settings of CONFIGS that are those of the language model."""
    settings: dict[str, Any] = CONFIGS[name].get("text_config", CONFIGS[name])
    return settings


def as_on_the_hub(name: str) -> str:
    """transformers turns the names of the vision tower's layers back, and those of the language model with them."""
    return name.replace("language_model.model.blocks.", "language_model.model.layers.")


def is_of_vision(name: str) -> bool:
    """Whether a tensor is of a part that is kept as it is."""
    return "vision_tower" in name or "mm_projector" in name


def hub_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name, split and named as transformers saves them; of a stack of experts its items."""
    theirs = revert_weight_conversion(model, dict(tensors))
    saved = {as_on_the_hub(name): tensor.clone() for name, tensor in theirs.items() if not is_of_vision(name)}
    stacks = {name: tensor for name, tensor in saved.items() if STACK.search(name)}
    items = {f"{name}[{index}]": item for name, stack in stacks.items() for index, item in enumerate(stack)}
    return {name: tensor for name, tensor in saved.items() if name not in stacks} | items


@dataclass(frozen=True)
class Batch:
    """Sequences padded in every way: not at all, right, left, on both sides, and one of a single token."""

    token_ids: Tensor
    mask: Tensor
    labels: Tensor  # -100 where the next token is padding or the own one is

    @classmethod
    def ragged(cls, seed: int = 0) -> "Batch":
        generator = torch.Generator().manual_seed(seed)
        bounds = [(0, 9), (0, 6), (4, 9), (2, 7), (8, 9), (0, 9), (1, 9), (0, 3)]
        token_ids = torch.randint(VOCAB_SIZE, (len(bounds), 9), generator=generator)
        mask = torch.zeros(token_ids.shape, dtype=torch.bool)
        for row, (start, end) in enumerate(bounds):
            mask[row, start:end] = True
        follows = mask.clone()
        follows[:, 1:] &= mask[:, :-1]
        follows[:, 0] = False
        return cls(token_ids, mask, torch.where(follows, token_ids, -100))


@dataclass(frozen=True)
class Reference:
    """What transformers computes; weights and gradients under the names of the hub."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def reference(name: str, dtype: torch.dtype, batch: Batch, **overrides: Any) -> Reference:
    """Logits, loss and all gradients of a model of CONFIGS on a batch."""
    with Widened() if dtype == torch.float64 else nullcontext():
        model = make_model(name, dtype, **overrides)
        output = model(input_ids=batch.token_ids, attention_mask=batch.mask.long(), labels=batch.labels)
        output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    tied = model.all_tied_weights_keys  # transformers saves one of the two
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return Reference(
        config=config,
        weights=hub_names(model, {key: value for key, value in model.state_dict().items() if key not in tied}),
        logits=output.logits.detach(),
        loss=output.loss.item(),
        gradients=hub_names(model, gradients),
    )


EOD_ID, NEW_TOKENS = 1, 8
# Of different lengths, one of a single token; a rank has three of them, two, one or none at all.
PROMPTS = [[7, 31, 2, 58, 19], [44], [12, 3, 60, 25, 25, 9, 51, 38, 17]]


def continued(name: str) -> list[list[int]]:
    """What `generate` of a model of CONFIGS adds to PROMPTS, greedily, in float64."""
    longest = max(map(len, PROMPTS))
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    with Widened():
        output = make_model(name, torch.float64).generate(
            input_ids=token_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=EOD_ID,
            pad_token_id=EOD_ID,
        )
    rows = [[*row, EOD_ID] for row in output[:, longest:].tolist()]
    return [row[: row.index(EOD_ID)] for row in rows]
