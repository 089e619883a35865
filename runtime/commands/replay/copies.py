"""What copies of hot experts would have taken off the ranks of a run, from the loads that it recorded.

Shapes: S steps, E experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

from dispatch.errors import InvalidValue
from dispatch.exchange.expert_copies import place_copies
from dispatch.exchange.placement import ExpertPlacement
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config_file import config_from_yaml_file
from runtime.terminal.quantities import percent, three_digits
from runtime.terminal.tables import new_table
from workers.record.run_log import LoadHistory, read_load_history


@dataclass(frozen=True, kw_only=True)
class CopiesOutcome:
    """What a run's loads would have been with at most `copies_per_rank` copies of hot experts on each rank.

    busiest: load of the busiest rank over the mean of all ranks, mean over layers and steps; a layer takes as long as
    its busiest rank. worst: the same of the worst step. num_copies: mean number of copies in a layer, on all ranks.
    """

    copies_per_rank: int
    busiest: float
    worst: float
    num_copies: float


def outcomes_of(history: LoadHistory, copies: Sequence[int], *, ep_size: int, every: int) -> list[CopiesOutcome]:
    """Compute the outcome without copies, and with each number of `copies` a rank.

    The loads of `every` steps place the copies of the next `every`. The first `every` steps, which have no loads before
    them, are left out.

    Raises:
        InvalidValue: the run is too short, or has fewer experts than `ep_size`.
    """
    if len(history.steps) <= every:
        raise InvalidValue(
            f"the run recorded {len(history.steps)} steps, and the first {every} only place copies; choose a smaller "
            "--every"
        )
    return [_outcome(history, each, ep_size=ep_size, every=every) for each in dict.fromkeys((0, *copies))]


def _outcome(history: LoadHistory, copies: int, *, ep_size: int, every: int) -> CopiesOutcome:
    busiest, num_copies = list[NDArray[np.float64]](), list[int]()
    for where in history.layout.slices:
        counts_SE = history.counts[:, where]
        parts = list[float]()
        for start in range(every, len(counts_SE), every):
            before_E = counts_SE[start - every : start].sum(0).tolist()
            placed = place_copies(before_E, ep_size, copies)
            num_copies.append(placed.num_copies)
            parts += [placed.busiest(loads_E) for loads_E in counts_SE[start : start + every].tolist()]
        busiest.append(np.array(parts))
    by_step = np.mean(busiest, axis=0)
    return CopiesOutcome(
        copies_per_rank=copies,
        busiest=float(by_step.mean()),
        worst=float(by_step.max()),
        num_copies=float(np.mean(num_copies)),
    )


def copies_table(run: Path, copies: Sequence[int], *, ep_size: int | None, every: int) -> RenderableType:
    """The outcomes as a table for the terminal. ep_size: None for that of the run. Raises as `outcomes_of`."""
    config = config_from_yaml_file(run / CONFIG_FILE)
    ep_size = ep_size or config.parallel.ep_size_of(config.cluster.num_workers)
    history = read_load_history(run)
    ExpertPlacement(min(history.layout.num_experts), ep_size)  # raises where a rank would hold no expert
    outcomes = outcomes_of(history, copies, ep_size=ep_size, every=every)
    table = new_table(("copies\na rank", "busiest\nrank", "worst\nstep", "copies\na layer", "of the excess\nleft"))
    excess = outcomes[0].busiest - 1
    for each in outcomes:
        left = (each.busiest - 1) / excess if excess > 0 else float("nan")
        cells = (each.busiest, each.worst, each.num_copies)
        table.add_row(f"at most {each.copies_per_rank}", *map(three_digits, cells), percent(left))
    return Group(
        Text(f"experts over {ep_size} ranks, copies placed every {every} steps", "bold"), table, Text(_NOTE, "dim")
    )


_NOTE = (
    "Busiest rank: its load over the mean of all ranks, mean of layers and steps; worst step: the same of one step. "
    "The loads of so many steps place the copies of the next ones; the first are left out. Excess: the busiest rank's "
    "load above the mean. Each copy costs its weights and gradients on the wire in every step."
)
