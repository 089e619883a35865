"""Freezes named parts of a model: training leaves them as they are."""

from collections.abc import Iterable, Sequence

from torch import nn

from dispatch.errors import InvalidValue

# The first word in a parameter's name that is a key here says to which part the parameter belongs.
PARTS = {
    "token_embedding": "embedding",
    "lm_head": "embedding",
    "attention": "attention",
    "ffn": "dense_ffn",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared_experts",
}
NAMES = tuple(dict.fromkeys([*PARTS.values(), "norms"]))


def check_parts(parts: Iterable[str]) -> None:
    """Raise InvalidValue for names that are no part of a model."""
    unknown = sorted(set(parts) - set(NAMES))
    if unknown:
        raise InvalidValue(f"optim.freeze names {', '.join(unknown)}; the parts of a model are {', '.join(NAMES)}")


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to; the name itself for none: such a parameter always trains."""
    if name.rpartition(".")[0].endswith("norm"):
        return "norms"
    return next((PARTS[word] for word in name.split(".") if word in PARTS), name)


def freezes_router(parts: Sequence[str], lora_rank: int) -> bool:
    """Whether routers do not train: they are among the frozen parts, or the model has adapters."""
    return "router" in parts or lora_rank > 0


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude these parts from training: no gradient, no optimizer state. Call it before the optimizer is built.

    The bias of a frozen router stays too (`Router.steers_bias`).

    Raises:
        InvalidValue: a name is no part of a model, or nothing is left to train.
    """
    check_parts(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidValue(f"optim.freeze ({', '.join(parts)}) leaves nothing to train; name fewer parts")
