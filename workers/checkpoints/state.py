"""The training state as one flat dict of tensors, under names that depend on neither ranks nor wrappers.

    model.<name>                            parameters and persistent buffers
    model.<layer>.experts.<expert_id>.<w>   one expert's weight, by global id
    optim.<key>.<name>                      optimizer state such as AdamW's exp_avg, experts one by one like the weights
    optim.step.<name>                       a number, such as AdamW's count of updates, once for a stack of experts
    ...<name>[<first>:<stop>]               rows of a dense tensor that is sharded (see workers.checkpoints.slices)
    law.bias, law.extras.<name>             the balancing law
    random.rank_<r>.<device type>           random generator of a rank

The first word of a name is its section. Every tensor is a view of the live one: loading writes into the live state.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dispatch.experts.stacked import EXPERT_WEIGHTS, Experts
from dispatch.laws import LawState
from workers.checkpoints.slices import Slice
from workers.distributed.sharded import is_sharded, local_rows

# What activation checkpointing, torch.compile and FSDP put into module names (torchtitan #3861).
_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})

_EXPERT = re.compile(r"(?P<section>model|optim\.\w+?)\.(?P<layer>.+)\.experts\.(?P<expert_id>\d+)\.(?P<weight>\w+)")
_BIAS = re.compile(r"model\.(?P<layer>.+)\.router\.expert_bias_E")


InitialState = Callable[[str, Tensor], dict[str, Tensor]]  # of a parameter and its canonical name


def canonical_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, initial_state: InitialState | None = None
) -> dict[str, Tensor]:
    """What this rank holds of the model and its optimizer, as views by canonical name.

    initial_state: makes the state that the optimizer would make for a parameter in its first step. An optimizer that
        has made no step gets this state here, so that there is something to load into; None where it has made one.

    Raises:
        ValueError: the optimizer updates a parameter that is not the model's, or the model has state that is no tensor.
    """
    expert_ids = {canonical_name(name): m.expert_ids for name, m in model.named_modules() if isinstance(m, Experts)}
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for wrapped_name, value in model.state_dict(keep_vars=True).items():
        name = canonical_name(wrapped_name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; checkpoints hold tensors only: make it a buffer")
        names.setdefault(id(value), name)
        tensors |= {f"model.{stored}": part for stored, part in _parts(name, value, expert_ids)}
    for name, parameter, state in _optimizer_state(optimizer, names, initial_state) if optimizer is not None else ():
        for key, value in state.items():
            parts = _parts(name, value, expert_ids, parameter)
            tensors |= {f"optim.{key}.{stored}": part for stored, part in parts}
    return tensors


def canonical_name(name: str) -> str:
    """The name without the wrappers that a module may be in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _parts(
    name: str, value: Tensor, expert_ids: Mapping[str, range], like: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds of a tensor, by key: single experts, a slice or all of it.

    like: for optimizer state, its parameter. State in host memory (workers.training.offload) is a plain tensor of this
    rank's rows: only the parameter knows which rows these are.
    """
    owner, _, weight = name.rpartition(".")
    rows, first = local_rows(value)
    if like is not None and local_rows(like)[0].shape == rows.shape:
        first, value = local_rows(like)[1], like
    if owner in expert_ids and value.ndim:  # a scalar such as `step` is one for the whole stack, equal on all ranks
        held = expert_ids[owner][first : first + len(rows)]
        for expert_id, part in zip(held, rows.unbind(0), strict=True):
            yield f"{owner}.{expert_id}.{weight}", part
    elif not is_sharded(value):
        yield name, rows
    elif len(rows):
        yield Slice(name, first, first + len(rows)).key, rows


def _optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], initial_state: InitialState | None
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """Name, parameter and state of each trainable parameter; missing state is made. names: by id of the parameter."""
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if p.requires_grad):
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer updates a parameter of shape {tuple(parameter.shape)} that is not in the model; "
                    "build it from this model's parameters"
                )
            name, state = names[id(parameter)], optimizer.state[parameter]
            if not state and initial_state is not None:
                state.update(initial_state(name, parameter))
            yield name, parameter, state


def missing_experts(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describe weights of a whole checkpoint that lack experts, one line each; empty when every expert is there.

    How many experts there must be is known from the length of the router's bias, which every rank holds whole. This
    finds ranks that name their experts by local id and so overwrite each other's (KempnerForge #202).
    """
    found: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for match in filter(None, map(_EXPERT.fullmatch, shapes)):
        found[match["section"], match["layer"], match["weight"]].add(int(match["expert_id"]))
    num_experts = {match["layer"]: shapes[match[0]][0] for match in filter(None, map(_BIAS.fullmatch, shapes))}
    required = {("model", layer, weight) for layer in num_experts for weight in EXPERT_WEIGHTS}
    return [
        f"{section}.{layer}.experts.*.{weight} has experts {sorted(found[section, layer, weight])}, "
        f"its router has {num_experts[layer]}"
        for section, layer, weight in sorted(required | found.keys())
        if layer in num_experts and found[section, layer, weight] != set(range(num_experts[layer]))
    ]


def law_tensors(state: LawState) -> dict[str, Tensor]:
    """The tensors of the balancing law's state: of a current state to save, of `Law.initial_state()` to load into."""
    return {"law.bias": state.bias_N} | {f"law.extras.{name}": value for name, value in state.extras.items()}


def law_state(tensors: Mapping[str, Tensor]) -> LawState:
    """The state back from `law_tensors`; other sections are ignored."""
    prefix = "law.extras."
    extras = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return LawState(tensors["law.bias"], extras)


def random_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """Copies of this rank's default random generators, uint8: the CPU's and, on a GPU, the device's."""
    states = {f"random.rank_{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random.rank_{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """Continue the random sequences that `random_state` took; other sections are ignored."""
    torch.set_rng_state(states[f"random.rank_{rank}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"random.rank_{rank}.cuda"], device)
