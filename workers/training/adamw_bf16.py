"""AdamW whose moments are kept in bfloat16: 4 bytes of state for each parameter, where those of fp32 take 8."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.distributed.sharded import local_rows
from workers.training.adamw import fused_adamw
from workers.training.optimizer import OptimConfig, decay_groups, register_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def bf16_moments(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step, under the same keys as AdamW's."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENTS}}


@register_optimizer("adamw_bf16", initial_state=bf16_moments, state_label="AdamW moments in bf16")
def adamw_bf16(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with moments in bfloat16, rounded stochastically; weights, gradients and the update itself stay fp32.

    Given the same gradients, the expectation of a moment is AdamW's moment. Its standard deviation is at most
    2^-8 / sqrt(1 - beta^2) of the largest value that it had: 0.9 % of a mean at beta1 0.9, 1.3 % of a mean square at
    beta2 0.95, but 8.7 % at 0.999. Rounded to nearest, a mean square would stop following its gradients where the
    change of a step is less than half of bf16's last bit.

    A repeated run has the same bits. Another EP size or sharding draws other random numbers.
    """
    return AdamWBf16(
        decay_groups(model, config),
        {"lr": config.lr, "beta1": config.beta1, "beta2": config.beta2, "eps": config.eps},
    )


class AdamWBf16(torch.optim.Optimizer):
    """Widens the moments of one parameter at a time, updates them by torch's fused AdamW, and rounds them again."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No closure is called."""
        generators: dict[torch.device, tuple[torch.Generator, int]] = {}
        parameters = [(each, group) for group in self.param_groups for each in group["params"]]
        for index, (parameter, group) in enumerate(parameters):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(bf16_moments(parameter))
            # All parameters are at the same step. `int` makes the host wait for the device: once, not each time.
            if parameter.device not in generators:
                generators[parameter.device] = torch.Generator(parameter.device), int(state["step"])
            generator, step = generators[parameter.device]
            # Seeded by step and index of the parameter: ranks that hold the same parameter must round alike, however
            # many random numbers their experts took before, and a resumed run must round as it would have.
            generator.manual_seed(step * len(parameters) + index)
            _update(parameter, state, group, generator)


def _update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], generator: torch.Generator) -> None:
    tensors = (parameter, cast(Tensor, parameter.grad), *(state[name] for name in MOMENTS))
    weight, gradient, mean, square = (local_rows(each)[0] for each in tensors)
    wide_mean, wide_square = mean.to(weight.dtype), square.to(weight.dtype)
    fused_adamw([weight], [gradient], [wide_mean], [wide_square], [state["step"]], group)
    # One draw of 32 bits serves both moments, 16 bits each.
    bits = torch.randint(-(2**31), 2**31, weight.shape, dtype=torch.int32, generator=generator, device=weight.device)
    _round_stochastically(mean, wide_mean, bits & 0xFFFF)
    _round_stochastically(square, wide_square, (bits >> 16) & 0xFFFF)


def _round_stochastically(out: Tensor, wide: Tensor, noise: Tensor) -> None:
    """Round away from zero with the probability that equals the part which bf16 cuts off.

    noise: int32, uniform in [0, 2^16).
    """
    # bf16 is the upper half of fp32. A carry from the lower half steps to the next larger magnitude.
    bits = wide.float().view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    out.copy_(bits.view(torch.float32))
