"""What a training run returns to the driver, which imports nothing else of the training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainOutcome:
    """How training ended: `completed` after the last step, else stopped early on request. Either way it has saved."""

    step: int
    completed: bool
