"""The router scores of recorded steps, in scores/: each rank writes those of its tokens. Format: docs/run-directory.md.

Shapes: T tokens of this rank and micro-batch, E experts.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dispatch.routing.router import Router
from workers.record.append_file import AppendFile
from workers.record.record_file import pack_record

SCORES = "scores"
SHAPE = "shape.json"
SCALE = 65535  # a score in [0, 1] is stored as a uint16: times this, rounded
SCORE_BYTES = 2


@dataclass(frozen=True)
class ScoreShape:
    """What a reader must know of the files of all ranks.

    names, num_experts: of the MoE layers. num_micro_batches: of each rank in a step.
    """

    names: tuple[str, ...]
    num_experts: tuple[int, ...]
    world_size: int
    num_micro_batches: int


class ScoreLog:
    """Writes the scores of this rank's routers during the forward, in every `every`-th step.

    While the disk is full, steps are left out, and `on_warning` is called. If the folder cannot be made, nothing is
    recorded. At most the scores of one layer and micro-batch are in memory.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        rank: int,
        shape: ScoreShape,
        *,
        every: int,
        on_warning: Callable[[str], None],
    ) -> None:
        """Make the folder and the file for a start, or a resume, of the run whose first step is `first_step`."""
        self._folder, self._rank, self._every = run_dir / SCORES / f"from_{first_step:08d}", rank, every
        self._on_warning = on_warning
        self._num_layers = len(shape.names)
        self._step: int | None = None
        self._num_seen = [0] * self._num_layers  # micro-batches of this step, by layer
        self._routers: list[Router] = []
        self._file: AppendFile | None = None
        self._trouble: OSError | None = None  # why scores are left out
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                (self._folder / SHAPE).write_text(json.dumps(asdict(shape)) + "\n")
            self._file = AppendFile(self._folder / f"rank_{rank}.bin")
        except OSError as error:
            on_warning(f"rank {rank} cannot write {self._folder} ({error}): the run goes on and records no scores")

    def attach(self, routers: Mapping[str, Router]) -> None:
        """Record the scores of these routers from now on, until `close`."""
        self._routers = list(routers.values())
        for layer, router in enumerate(self._routers):
            router.on_scores = lambda scores_TE, layer=layer: self._write(layer, scores_TE)

    def begin_step(self, step: int) -> None:
        """Begin a step, counted from 1. The first one is always recorded."""
        self._step = step if (step - 1) % self._every == 0 else None
        self._num_seen = [0] * self._num_layers
        if self._step is None or self._file is None or self._trouble is None:
            return
        self._file.flush()  # first the rest of the record that the full disk has cut short
        if self._file.trouble:
            self._step = None
        else:
            self._trouble = None
            self._on_warning(f"rank {self._rank} records scores again, from step {step} on")

    def close(self) -> None:
        """Leave the routers and close the file."""
        for router in self._routers:
            router.on_scores = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, layer: int, scores_TE: Tensor) -> None:
        if self._step is None or self._file is None:
            return
        micro = self._num_seen[layer]
        self._num_seen[layer] += 1
        # Not compressed: all but the highest bits of scores are noise. zlib saves 0 % of sigmoid scores, and 14 to 24 %
        # of softmax scores.
        content = pack_scores(scores_TE)
        self._file.write(pack_record(self._step, micro * self._num_layers + layer, content))
        if self._file.trouble:
            # Unlike metrics they are not kept in memory until there is room: they would soon fill it.
            self._step, self._trouble = None, self._file.trouble
            self._on_warning(
                f"rank {self._rank} cannot write {self._folder} ({self._trouble}): the run goes on and leaves out "
                "scores until there is room; free some space, or record fewer steps, as with --balance.record 10"
            )


def pack_scores(scores_TE: Tensor) -> bytes:
    """Scores in [0, 1] as little-endian uint16, row by row: a step of 1.5e-5."""
    # int32 first, as torch supports few operations on uint16.
    steps_TE = (scores_TE.detach().float().clamp(0, 1) * SCALE).round().to(torch.int32).cpu()
    return steps_TE.numpy().astype("<u2").tobytes()


def set_aside_later_scores(run_dir: Path, step: int) -> None:
    """Rename the folders whose first step is after `step`: a resumed run trains these steps again. Deletes nothing."""
    for folder in sorted((run_dir / SCORES).glob("from_" + "[0-9]" * 8)):
        if int(folder.name.removeprefix("from_")) > step:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.superseded_{number}")).exists():
                number += 1
            folder.rename(aside)
