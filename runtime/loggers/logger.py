"""The interface of a logger, and the packages that loggers need."""

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
    """The run whose metrics a logger gets."""

    path: Path
    name: str
    settings: Mapping[str, Any]
    """The values of config.yaml, by dotted name."""
    environ: Mapping[str, str]
    id: str | None
    """The logger's id of the run, from the first time that it was opened; None at that time."""


class MetricsLogger(Protocol):
    """A tool that draws curves. Its methods are called on one thread. They may wait, and raise any exception."""

    @property
    def id(self) -> str | None:
        """The tool's id of the run. The run directory keeps it, so that a run that resumes continues its curves."""
        ...

    def log(self, line: Line, values: Mapping[str, float]) -> None:
        """Take a line of metrics.jsonl, with its numbers by name (`scalars`).

        Steps increase, except after a recovery: then some steps are trained again, and have a second line.
        """
        ...

    def close(self, state: str) -> None:
        """Send what is left. state: that of the run: finished, interrupted, failed, or running if that is unknown."""
        ...


def check_installed(names: Collection[str]) -> None:
    """Raise UserError if a logger needs a package that is not installed. Imports none of them."""
    for name in names:
        module, package = NEEDED[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"run.log_to names {name}, which needs the package {package}: pip install 'trimtab[{name}]', or leave "
                f"{name} out of --run.log_to"
            )
