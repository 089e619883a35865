"""An optimizer of one's own, by one function and one registration. See docs/how-to-add.md."""

import torch
from torch import Tensor, nn

from workers.training.optimizer import OptimConfig, decay_groups, register_optimizer


def momentum_buffer(parameter: Tensor) -> dict[str, Tensor]:
    """What torch's SGD holds of a parameter before its first step."""
    return {"momentum_buffer": torch.zeros_like(parameter)}


@register_optimizer("sgd", initial_state=momentum_buffer, state_label="SGD momentum")
def sgd(model: nn.Module, config: OptimConfig, *, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum; vectors, such as norms, learn at half the rate."""
    matrices, vectors = decay_groups(model, config)
    return torch.optim.SGD([matrices, {**vectors, "lr_scale": 0.5}], lr=config.lr, momentum=momentum)
