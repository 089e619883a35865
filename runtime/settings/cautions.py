"""Warnings about a run: about its settings before it starts, and about its metrics while it trains.

The functions return texts; the caller prints and records them.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from runtime.settings.config import TrainConfig

WINDOW = 20  # steps over which a metric must be bad
# The load of a batch varies by chance, and more so in the first steps of a router. So MaxVio is reported only if it is
# above this multiple of the chance floor, and above this value.
FAR_ABOVE_FLOOR, MIN_REPORTED_VIO = 5.0, 1.0
RISEN = 1.1  # The loss has risen if the mean of a window is above this multiple of the best window's.


def cautions(config: TrainConfig, *, is_imported: bool) -> list[str]:
    """Warnings, a sentence each, about settings that are allowed and rarely meant.

    is_imported: whether the run was made by `trimtab import`.
    """
    again = "import it again" if is_imported else "start a new run"
    warnings = []
    if is_imported and not config.data.path:
        warnings.append(
            f"the imported model is trained on the built-in demo text, with optim.lr {config.optim.lr:g}; {again} with "
            "--data.path to train it on yours"
        )
    is_steered = config.balance.law != "none" or config.aux.loss != "none" or config.freezes_router
    if config.model.lora.rank and not is_imported:
        warnings.append(
            f"model.lora.rank {config.model.lora.rank} trains adapters of a model whose own weights stay as they were "
            "drawn; import a model with --model.lora.rank, or leave it out"
        )
    has_moe = config.model.num_dense_layers < config.model.num_layers
    if has_moe and not is_steered:
        limit = ", whose bias the files of some families cannot hold" if is_imported else ""
        warnings.append(
            f"nothing balances the load of the experts (balance.law none, aux.loss none); to balance it, {again} with "
            f"--aux.loss global_batch, or with --balance.law adaptive{limit}"
        )
    if config.parallel.expert_copies and config.parallel.resolve(config.cluster.num_workers) == 1:
        warnings.append(
            f"parallel.expert_copies ({config.parallel.expert_copies}) places no copies: each rank has all experts, as "
            "parallel.ep_size is 1; share them with another --parallel.ep_size, or leave the copies out"
        )
    return warnings


class TrainingWarnings:
    """Watches the training lines of a run, and reports each kind of trouble once.

    law: what balances the load, the law or an auxiliary loss; "none" if nothing does.
    """

    def __init__(self, law: str) -> None:
        self._law = law
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._best_loss = math.inf
        self._told: set[str] = set()

    def notice(self, line: Mapping[str, Any]) -> list[str]:
        """Take a training line of metrics.jsonl; return the texts of trouble that has not been reported before."""
        self._lines.append(line)
        if len(self._lines) < WINDOW:
            return []
        found = {"loss": self._loss(), "dead": self._dead_experts(), "imbalance": self._imbalance()}
        new = {name: text for name, text in found.items() if text and name not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def _mean(self, field: str) -> float:
        """Mean over the window; NaN if a step lacks the number."""
        values = [line.get(field) for line in self._lines]
        return math.fsum(math.nan if value is None else value for value in values) / WINDOW

    def _loss(self) -> str:
        if not any(math.isfinite(line.get("loss") or math.nan) for line in self._lines):
            return f"no loss of the last {WINDOW} steps is a finite number; a lower optim.lr may help"
        mean, best = self._mean("loss"), self._best_loss
        if math.isfinite(mean):
            self._best_loss = min(best, mean)
        if mean > RISEN * best:
            return f"the loss has risen to {mean:.3g}, mean of {WINDOW} steps, from {best:.3g} at its best"
        return ""

    def _dead_experts(self) -> str:
        # A high chance floor means few tokens for each expert: then some experts get none by chance.
        dead = min(line.get("dead_experts") or 0 for line in self._lines)
        if dead and self._mean("max_vio_floor") < MIN_REPORTED_VIO:
            return f"in each of the last {WINDOW} steps, {dead} or more experts got no token"
        return ""

    def _imbalance(self) -> str:
        vio, floor = self._mean("max_vio_batch"), self._mean("max_vio_floor")
        if self._law == "none" and vio > max(MIN_REPORTED_VIO, FAR_ABOVE_FLOOR * floor):
            return f"MaxVio is {vio:.3g}, mean of {WINDOW} steps, and {floor:.2g} by chance; nothing balances the load"
        return ""
