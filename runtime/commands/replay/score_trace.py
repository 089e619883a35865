"""A trace of the router scores that a run recorded, merged over its ranks."""

import json
import math
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dispatch.config import RouterConfig
from dispatch.errors import InvalidValue
from runtime.commands.replay.starts import read_starts
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config_file import config_from_yaml_file
from workers.record.record_file import RecordPlace, list_records, read_record
from workers.record.run_log import read_load_history
from workers.record.score_log import SCALE, SCORES, SHAPE, ScoreShape

_Pieces = list[tuple[Path, RecordPlace]]  # of one layer, in the order of ranks and micro-batches


class NoScoresError(InvalidValue):
    """The run has no recorded scores, or no step that all ranks recorded completely."""


class RecordedScores:
    """Recorded router scores of a run. `steps` lists the training steps that have them; `read` loads those of one."""

    def __init__(self, shape: ScoreShape, pieces: dict[int, list[_Pieces]]) -> None:
        self._shape, self._pieces = shape, pieces
        self.steps = sorted(pieces)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return self._shape.num_experts

    def begin_at(self, step: int) -> None:
        """Drop the steps before `step`. Raises InvalidValue if fewer than two are left."""
        kept = [each for each in self.steps if each >= step]
        if len(kept) < 2:
            last = self.steps[-2] if len(self.steps) > 1 else self.steps[-1]
            raise InvalidValue(f"--first {step} must leave recorded steps to play on: at most {last}")
        self.steps = kept

    def read(self, step: int) -> list[Tensor]:
        """Load the scores of one step: fp32 (T, E) for each MoE layer. T: tokens of the batch, rank 0's first."""
        return [
            torch.cat([_unpack(path, place, num_experts) for path, place in layer])
            for layer, num_experts in zip(self._pieces[step], self._shape.num_experts, strict=True)
        ]


def read_scores(run: Path) -> RecordedScores:
    """Open the router scores that a run recorded (`balance.record`), also while the run goes on.

    Args:
        run: the run directory.
    Returns:
        The recorded steps, merged over ranks. A step that any rank has not recorded is left out.
    Raises:
        InvalidValue: the run has no recorded scores; the message says how to record some.
    """
    pieces: dict[int, list[_Pieces]] = {}
    shape: ScoreShape | None = None
    for folder, end in _folders(run):
        shape = _read_shape(folder)
        pieces |= {step: layers for step, layers in _read_index(folder, shape).items() if step < end}
    if shape is None or not pieces:
        raise NoScoresError(
            f"{run} has no recorded scores to play laws on; record them in training: trimtab train --balance.record "
            f"for every step, --balance.record 10 for each tenth; a run goes on with: trimtab train --resume {run} "
            "--balance.record 10"
        )
    return RecordedScores(shape, pieces)


class RecordedTrace:
    """A run's recorded scores as a trace (runtime.commands.replay.trace): its steps number what was recorded, from 1.

    shift: first training step with another mix of text; None: that of the run's settings, if it has one.
    first: training step to begin at, as if balancing began there, with a router that has trained; None: the first.

    Raises:
        NoScoresError: the run has no scores.
        InvalidValue: the training step `shift` or `first` is outside of the recorded ones.
    """

    def __init__(self, run: Path, shift: int | None = None, first: int | None = None) -> None:
        config = config_from_yaml_file(run / CONFIG_FILE)
        self._found = read_scores(run)
        self._first = first
        if first is not None:
            self._found.begin_at(first)
        self._name = run.resolve().name
        self.layout = read_load_history(run).layout
        self.router: RouterConfig = config.model.moe
        self.shift_step = self._own_shift(config.data.shift_at) if shift is None else self._number_of(shift)

    @property
    def name(self) -> str:
        """The run's name, and how much of it was recorded."""
        num_steps, last = len(self._found.steps), self._found.steps[-1]
        if self._first is not None:
            return f"{self._name}, {num_steps} steps from {self._found.steps[0]} on"
        return self._name if num_steps == last else f"{self._name}, {num_steps} recorded of {last} steps"

    @property
    def training_steps(self) -> list[int]:
        """Numbers of the training steps that were recorded."""
        return self._found.steps

    @property
    def steps(self) -> range:
        """1 to the number of recorded steps."""
        return range(1, len(self._found.steps) + 1)

    def scores(self, step: int) -> list[Tensor]:
        """The scores of the whole global batch, which were recorded in 16 bits."""
        return self._found.read(self._found.steps[step - 1])

    def _own_shift(self, training_step: int) -> int | None:
        inside = self._found.steps[0] < training_step <= self._found.steps[-1]
        return self._number_of(training_step) if inside else None

    def _number_of(self, training_step: int) -> int:
        number = bisect_left(self._found.steps, training_step) + 1
        if not 1 < number <= len(self._found.steps):
            first, last = self._found.steps[0], self._found.steps[-1]
            raise InvalidValue(f"--shift {training_step} must lie inside the recorded steps, {first + 1} to {last}")
        return number


def _folders(run: Path) -> list[tuple[Path, float]]:
    """The folder of each start that recorded scores, and the step from which a later start replaced it."""
    first_steps = [start.first_step for start in read_starts(run)]
    found = []
    for folder in sorted((run / SCORES).glob("from_" + "[0-9]" * 8)):
        first = int(folder.name.removeprefix("from_"))
        # The newest start from there: older ones were renamed when it resumed.
        newest = max((index for index, step in enumerate(first_steps) if step == first), default=-1)
        if (folder / SHAPE).exists():
            found.append((folder, min(first_steps[newest + 1 :], default=math.inf)))
    return found


def _read_shape(folder: Path) -> ScoreShape:
    stored = json.loads((folder / SHAPE).read_text())
    return ScoreShape(
        names=tuple(stored["names"]),
        num_experts=tuple(stored["num_experts"]),
        world_size=stored["world_size"],
        num_micro_batches=stored["num_micro_batches"],
    )


def _read_index(folder: Path, shape: ScoreShape) -> dict[int, list[_Pieces]]:
    """Where the pieces of each complete step lie, layer by layer."""
    num_layers = len(shape.names)
    layers: dict[int, list[_Pieces]] = defaultdict(lambda: [[] for _ in range(num_layers)])
    for rank in range(shape.world_size):
        path = folder / f"rank_{rank}.bin"
        for place in list_records(path)[0] if path.exists() else ():
            layers[place.step][place.tag % num_layers].append((path, place))
    wanted = shape.world_size * shape.num_micro_batches
    return {step: found for step, found in layers.items() if all(len(pieces) == wanted for pieces in found)}


def _unpack(path: Path, place: RecordPlace, num_experts: int) -> Tensor:
    values = np.frombuffer(read_record(path, place), "<u2").reshape(-1, num_experts)
    return torch.from_numpy(values.astype(np.float32) / SCALE)
