"""Runs a layer on one batch: outputs, gradients, and weights after optimizer steps, as float64 on the CPU."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from dispatch.parity.cases import Case, CaseInputs
from dispatch.parity.layers import LayerUnderTest

COLUMNS = ("outputs", "dx", "gradients", "weights")
Measured: TypeAlias = dict[str, dict[str, Tensor]]  # tensors by column of the report and by name

# Far above the published rate, so that the bias changes choices within a few steps.
BALANCE = BalanceConfig(law="sign", rate=0.02)
OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], int]] = {
    "SGD": (lambda parameters: torch.optim.SGD(parameters, lr=1.0), 1),
    # With the default eps of 1e-8 the rounding error of a gradient that should be zero would become a visible step.
    "AdamW": (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-5), 5),
}


def measure(
    build: Callable[[], LayerUnderTest],
    case: Case,
    batch: CaseInputs,
    num_global_tokens: int,
    group: dist.ProcessGroup | None,
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS),
) -> Measured:
    """Run a layer on this rank's batch and return what is compared, by column of the report.

    num_global_tokens: of the batches of all ranks. Collective over `group`; None for one process with all tokens.
    """
    layer = build()
    for expert, value in case.bias:
        layer.expert_bias_E[expert] = value
    layer.tokens_per_expert_E.zero_()
    y_TH, grad_x_TH = _backward(layer, batch, num_global_tokens, group)
    load_E = _take_load(layer, group)
    measured: Measured = {
        "outputs": {"y": y_TH, "load": load_E},
        "dx": {"dx": grad_x_TH},
        "gradients": layer.read(_gradient) | {"norm": _gradient_norm(layer, group)},
        "weights": {},
    }
    measured = {column: _exact(tensors) for column, tensors in measured.items()}
    # All optimizers start from the same weights, gradients and bias. Gradients need not be copied, since the next step
    # makes new ones.
    start = [(parameter.detach().clone(), parameter.grad) for parameter in _trained(layer)]
    bias_E = layer.expert_bias_E.clone()
    for name in optimizers:
        for parameter, (weight, grad) in zip(_trained(layer), start, strict=True):
            parameter.data.copy_(weight)
            parameter.grad = grad
        layer.expert_bias_E.copy_(bias_E)
        weights = _train(layer, load_E, batch, num_global_tokens, group, *OPTIMIZERS[name])
        measured["weights"] |= _exact({f"{tensor} after {name}": weight for tensor, weight in weights.items()})
    return measured


def _exact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float64 on the CPU."""
    return {name: tensor.detach().double().cpu().clone() for name, tensor in tensors.items()}


def _backward(
    layer: LayerUnderTest, batch: CaseInputs, num_global_tokens: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Forward and backward of this rank's part of the mean over the global batch; sums dense gradients over ranks."""
    weight = layer.expert_parameters[0]
    x_TH = batch.x_TH.to(weight.device, weight.dtype, copy=True).requires_grad_()
    y_TH = layer.module(x_TH)
    # Backward starts from the gradient of the outputs, not from a loss: in bf16 the loss, a sum, would be rounded.
    y_TH.backward((batch.grad_output_TH / num_global_tokens).to(y_TH.device, y_TH.dtype))
    mine = {id(parameter) for parameter in layer.expert_parameters}
    for parameter in _trained(layer):
        if parameter.grad is None:
            # NaN, so that the comparison fails. An expert without rows must have a gradient of zero: with None it would
            # miss weight decay, and a collective that other ranks enter.
            parameter.grad = torch.full_like(parameter, torch.nan)
        if group is not None and id(parameter) not in mine:
            dist.all_reduce(parameter.grad, group=group)
    return y_TH, _gradient(x_TH)


def _trained(layer: LayerUnderTest) -> list[nn.Parameter]:
    return [parameter for parameter in layer.module.parameters() if parameter.requires_grad]


def _gradient(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.grad is None else tensor.grad


def _gradient_norm(layer: LayerUnderTest, group: dist.ProcessGroup | None) -> Tensor:
    """Norm of all gradients of the model: those of the experts of all ranks, and all others once."""
    mine = {id(parameter) for parameter in layer.expert_parameters}
    squares = {parameter: _gradient(parameter).double().square().sum() for parameter in _trained(layer)}
    expert_square = torch.stack([square for parameter, square in squares.items() if id(parameter) in mine]).sum()
    if group is not None:
        dist.all_reduce(expert_square, group=group)
    dense_square = torch.stack([square for parameter, square in squares.items() if id(parameter) not in mine]).sum()
    return (expert_square + dense_square).sqrt()


def _take_load(layer: LayerUnderTest, group: dist.ProcessGroup | None) -> Tensor:
    """The choices of all ranks since the last call, int64 (E,) on the CPU."""
    load_E = layer.tokens_per_expert_E.to(torch.int64, copy=True)
    layer.tokens_per_expert_E.zero_()
    if group is not None:
        dist.all_reduce(load_E, group=group)
    return load_E.cpu()


def _train(
    layer: LayerUnderTest,
    load_E: Tensor,
    batch: CaseInputs,
    num_global_tokens: int,
    group: dist.ProcessGroup | None,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    num_steps: int,
) -> dict[str, Tensor]:
    """Weights and bias after `num_steps` on the same batch. From the first update on, the bias is the sign law's.

    The parameters already have the gradients of the first step, and load_E is its load.
    """
    optimizer = make_optimizer(_trained(layer))
    law = Law(BALANCE, LoadLayout(("layer",), (len(layer.expert_bias_E),), (True,)))
    state: LawState = law.initial_state()
    for step in range(1, num_steps + 1):
        if step > 1:
            optimizer.zero_grad()
            _backward(layer, batch, num_global_tokens, group)
            load_E = _take_load(layer, group)
        optimizer.step()
        state = law.update(load_E, state, step)
        layer.expert_bias_E.copy_(state.bias_N)
    return layer.read(lambda parameter: parameter.detach()) | {"bias": layer.expert_bias_E}
