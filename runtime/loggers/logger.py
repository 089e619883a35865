"""What a logger is, which ones there are, and what they need."""

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dispatch.errors import UserError
from workers.record.record_lines import Line

# The module that each logger imports, and the package that brings it.
NEEDED = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}


@dataclass(frozen=True)
class LoggedRun:
    """The run whose numbers a logger gets."""

    path: Path
    name: str
    settings: Mapping[str, Any]
    """By dotted name, as config.yaml has them."""
    environ: Mapping[str, str]
    id: str | None
    """What the logger called the run when it was opened first; None the first time."""


class MetricsLogger(Protocol):
    """A tool that draws curves. Its methods are called on one thread, and may wait and raise whatever they like."""

    @property
    def id(self) -> str | None:
        """What the tool knows the run by. It is kept in the run directory; a run that resumes continues its curves."""
        ...

    def log(self, line: Line, values: Mapping[str, float]) -> None:
        """Take a line of metrics.jsonl, with its numbers by name.

        Steps increase, but for a run that recovers: it makes some steps anew, and their lines come again.
        """
        ...

    def close(self, state: str) -> None:
        """Send what is left; the run is in this state: finished, interrupted, failed, or running when nobody said."""
        ...


def check_installed(names: Collection[str]) -> None:
    """Raise UserError where a logger needs a package that is not installed. Imports none of them."""
    for name in names:
        module, package = NEEDED[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"run.log_to names {name}, which needs the package {package}: pip install 'trimtab[{name}]', or leave "
                f"{name} out of --run.log_to"
            )
