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

from tests.workers.model.families.configs import COMMON, CONFIGS, VOCAB_SIZE

STACK = re.compile(r"\.experts\.[a-z]")  # and not a number


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
        return {**COMMON, **CONFIGS[name], **overrides}
    text = {"model_type": "deepseek_v3", **COMMON, **CONFIGS[name]["text_config"], **overrides}
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
