"""The learning rate of each step: linear warm-up, then half a cosine. `optim` of the settings has its constants."""

import math

from workers.training.optimizer import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of one update. step counts the updates made before: 0 for the first, total_steps - 1 for the last.

    Warm-up: lr * (step + 1) / warmup_steps. Then half a cosine from lr that ends at lr * min_lr_ratio.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_steps = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
