"""What a section is: a name, a heading, how it measures, and how its figures become lines of the page."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes

Figures = dict[str, Any]
"""JSON values."""


@dataclass(frozen=True)
class Setting:
    """What a section is given. folder: an empty one, on the disk to measure. tell: takes what is known so far."""

    sizes: Sizes
    device: torch.device
    folder: Path
    tell: Callable[[Figures], None]


@dataclass(frozen=True)
class Section:
    """One section. Its module has `measure(setting) -> None`, which tells figures, and `show(figures) -> list[str]`."""

    title: str
    module: str

    def measure(self, setting: Setting) -> None:
        """Measure; each call of `setting.tell` replaces what was told before."""
        importlib.import_module(self.module).measure(setting)

    def show(self, figures: Figures) -> list[str]:
        """Lines of Markdown, also of figures that are not complete."""
        lines: list[str] = importlib.import_module(self.module).show(figures)
        return lines


# Checks come first, since the figures of a wrong layer are worth nothing.
SECTIONS = {
    "checks": Section("Checks", "benchmarks.gpu.checks"),
    "layer": Section("The MoE layer beside others", "benchmarks.gpu.layer"),
    "kernels": Section("Kernels around the matmuls", "benchmarks.gpu.kernels"),
    "training": Section("Training", "benchmarks.gpu.training"),
    "profile": Section("Profile of a training step", "benchmarks.gpu.step_profile"),
    "decoding": Section("Decoding", "benchmarks.gpu.decoding"),
    "checkpoint": Section("Checkpoints", "benchmarks.gpu.checkpoints"),
    "dispatch": Section("trimtab bench dispatch", "benchmarks.gpu.bench_dispatch"),
}


def row(*cells: object) -> str:
    """A line of a table of Markdown."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), f"|{'---|' * len(cells)}"]


def first_line(error: BaseException) -> str:
    """An error in one line: messages of torch and Triton have hundreds."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"
