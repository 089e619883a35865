"""Muon: the update of a hidden matrix is its momentum made orthogonal. Everything else is updated by AdamW.

Sources: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), for the iteration;
Moonlight, arXiv 2502.16982, for weight decay and the scale with which AdamW's learning rate serves.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dispatch.errors import InvalidValue
from dispatch.experts.stacked import Experts
from workers.distributed.sharded import all_rows, local_rows
from workers.model.attention import GroupedQueryAttention
from workers.training.adamw import fused_adamw, moments
from workers.training.optimizer import OptimConfig, decay_groups, is_hidden_matrix, register_optimizer

# Coefficients of Jordan's quintic: steep at 0, so that small singular values grow fast. They end near 1 and do not
# converge to it.
A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-7  # against 0/0 for a matrix of zeros
# Moonlight, section 2.2: the root mean square of a full-rank update is then 0.2, about that of AdamW's update.
UPDATE_RMS = 0.2
# A stack of experts is updated in parts of at most so many elements, and at least one expert. That bounds the temporary
# memory of a step, about 20 bytes an element.
MAX_ELEMENTS_AT_ONCE = 2**25


def momentum_buffer(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a hidden matrix before its first step."""
    return {"momentum_buffer": torch.zeros_like(parameter)}


def check_options(momentum: float, ns_steps: float, nesterov: float) -> None:
    """Raise InvalidValue where one is out of its range."""
    if not 0 <= momentum < 1:
        raise InvalidValue(f"optim.options.momentum ({momentum:g}) must be in [0, 1) for optimizer 'muon'")
    if ns_steps not in range(1, 100):
        raise InvalidValue(f"optim.options.ns_steps ({ns_steps:g}) must be a whole number from 1 to 99; 5 is usual")
    if nesterov not in (0, 1):
        raise InvalidValue(f"optim.options.nesterov ({nesterov:g}) must be 1 (on) or 0 (off)")


@register_optimizer(
    "muon",
    initial_state=moments,
    matrix_state=momentum_buffer,
    state_label="Muon momentum, AdamW moments",
    gathers_matrices=True,
    check=check_options,
)
def muon(
    model: nn.Module, config: OptimConfig, *, momentum: float = 0.95, ns_steps: float = 5, nesterov: float = 1
) -> torch.optim.Optimizer:
    """Muon for attention, feed-forwards and experts, AdamW for embedding, head, router and vectors.

    Args:
        momentum: decay of the mean of gradients.
        ns_steps: Newton-Schulz iterations, from 1 to 99.
        nesterov: 1 looks ahead by one gradient, 0 does not.
    """
    matrices = [each for name, each in model.named_parameters() if each.requires_grad and is_hidden_matrix(name, each)]
    is_matrix = set(matrices)
    others = [
        {**group, "params": [each for each in group["params"] if each not in is_matrix]}
        for group in decay_groups(model, config)
    ]
    matrix_group = {
        "params": matrices,
        "weight_decay": config.weight_decay,
        "momentum": momentum,
        "ns_steps": int(ns_steps),
        "nesterov": bool(nesterov),
    }
    defaults = {"lr": config.lr, "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    return Muon(matrix_group, others, packed_rows(model), defaults)


def packed_rows(model: nn.Module) -> dict[Tensor, list[int]]:
    """For each parameter that packs several matrices, the rows of each: queries, keys and values; gate and up.

    The projections of latent attention count as one matrix each, as their authors train and publish them.
    """
    packed: dict[Tensor, list[int]] = {}
    for module in model.modules():
        if isinstance(module, Experts):
            packed[module.gate_up_proj] = [module.gate_up_proj.shape[-2] // 2] * 2
        elif isinstance(module, GroupedQueryAttention):
            key_rows = module.num_kv_heads * module.head_dim
            packed[module.qkv_proj.weight] = [module.num_heads * module.head_dim, key_rows, key_rows]
    return packed


class Muon(torch.optim.Optimizer):
    """Muon for the parameters of one group, AdamW for those of the others.

    A stack of experts is a batch of matrices, each of which this rank holds whole. Of a sharded dense matrix a rank
    holds some rows: it gathers the whole direction, computes the whole update, and takes its rows of that. So the
    update has the same bits on all ranks.

    Args:
        matrices: the group of the hidden matrices, with weight_decay, momentum, ns_steps and nesterov.
        others: groups with weight_decay.
        packed: what `packed_rows` returns.
        defaults: lr, beta1, beta2 and eps.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        others: list[dict[str, Any]],
        packed: Mapping[Tensor, list[int]],
        defaults: dict[str, Any],
    ) -> None:
        super().__init__([matrices, *others], defaults)
        self.packed = packed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No closure is called.

        Collective over the ranks that a matrix is sharded over: each must call it, with gradients of the same ones.
        """
        matrices, *others = self.param_groups
        for parameter in _with_gradient(matrices):
            self._update_matrix(parameter, matrices)
        for group in others:
            self._update_by_adamw(_with_gradient(group), group)

    def _update_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(momentum_buffer(parameter))
        tensors = [_local(each) for each in (parameter, parameter.grad, state["momentum_buffer"])]
        is_stack = parameter.ndim > 2
        at_once = max(1, MAX_ELEMENTS_AT_ONCE // math.prod(parameter.shape[1:])) if is_stack else len(parameter)
        # A rank without rows still goes through the loop once, as `split` returns one empty part: the gather of the
        # direction is collective.
        for rows, gradient, mean in zip(*(each.split(at_once) for each in tensors), strict=True):
            mean.lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
            update = self._orthogonal(direction, parameter, group["ns_steps"])
            rows.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _orthogonal(self, direction: Tensor, parameter: Tensor, num_steps: int) -> Tensor:
        """The update, before the learning rate, of the rows or experts in `direction`."""
        is_stack = parameter.ndim > 2
        narrow = direction.to(_iteration_dtype(direction))
        matrices = narrow if is_stack else all_rows(narrow, parameter)
        parts = matrices.split(self.packed.get(parameter, matrices.shape[-2]), dim=-2)
        update = torch.cat([_scaled(newton_schulz(part, num_steps), direction.dtype) for part in parts], dim=-2)
        first = local_rows(parameter)[1]
        return update if is_stack else update[first : first + len(direction)]

    def _update_by_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(moments(parameter))
        states = [self.state[parameter] for parameter in parameters]
        fused_adamw(
            [_local(parameter) for parameter in parameters],
            [_local(parameter.grad) for parameter in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
            group,
        )


# torch.optim.Muon updates 2-D parameters that this rank holds whole. Its helper `_zeropower_via_newtonschulz` is not
# taken: it is private, is for one matrix, and computes in bf16 also what is in float64.
def newton_schulz(matrices: Tensor, num_steps: int) -> Tensor:
    """Bring the singular values of each matrix near 1 and keep its singular vectors.

    Args:
        matrices: (..., rows, columns), floating point, in whose dtype it is computed. A matrix of zeros stays zero.
        num_steps: iterations; 5 bring singular values of at least 0.002 of the norm to between 0.68 and 1.21.
    """
    rows, columns = matrices.shape[-2:]
    # The Gram matrix of the shorter side is the smaller one.
    x = (matrices if rows <= columns else matrices.mT).reshape(-1, min(rows, columns), max(rows, columns))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x if rows <= columns else x.mT).reshape(matrices.shape)


def _scaled(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    return matrices.to(dtype) * (UPDATE_RMS * math.sqrt(max(matrices.shape[-2:])))


def _iteration_dtype(direction: Tensor) -> torch.dtype:
    """bf16 on CUDA, where the iteration needs no more precision; a CPU is no faster in it, and tests use float64."""
    return torch.bfloat16 if direction.is_cuda and direction.dtype == torch.float32 else direction.dtype


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _local(tensor: Tensor | None) -> Tensor:
    return local_rows(cast(Tensor, tensor))[0]
