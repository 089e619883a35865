"""The tables of `trimtab bench coordinator` for the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from runtime.commands.bench.coordinator.load import percentile
from runtime.commands.bench.coordinator.measurement import ACTOR, FUNCTION, ControlMeasurement
from runtime.commands.bench.coordinator.model import Modelled
from runtime.commands.bench.coordinator.ranks import PHASES, RoundSamples
from runtime.terminal.quantities import three_digits
from runtime.terminal.tables import new_table
from workers.actor import usable_cores

WIDTH = 100  # of the output where that is no terminal

MODEL_NOTE = """\
Modelled: the step of one rank, with the coordinator, which gets one report whatever the number of
ranks; and hops as measured here on loopback, {alpha} us + {beta} us a MiB, times their number. Tree:
sums over ceil(log2 ranks) hops up and as many down, which runs. Ring: gloo's all-reduce, over
2 (ranks - 1) hops. Both then broadcast over ceil(log2 ranks) hops. The measured ranks share {cores}
cores: beyond that many they wait for each other, which the model does not know."""


LOOK: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": (0, 1)}
MODEL_COLUMNS = ("ms by\ntree", "ms by\nring", "KiB\nsent")


def show(measured: ControlMeasurement) -> None:
    """Print what the coordinator costs, what a round costs, and the model."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    case = measured.case
    console.print(f"Control path, law {case.law}, {case.layers} x {case.experts} experts, {case.rounds} rounds\n")
    console.print(_load_table(measured))
    console.print(_round_table(measured))
    if measured.hop is not None:
        console.print(_note(measured))


def _load_table(measured: ControlMeasurement) -> Table:
    columns = ("law", "experts", "report\nKiB", "answer\nKiB", "law\nms", "function\nms", "actor\nms", "actor\np99 ms")
    table = new_table(columns, title="The coordinator: from the counts on rank 0 to the checked answer", **LOOK)
    for law, load in measured.loads.items():
        figures = [load.report_bytes / 1024, load.answer_bytes / 1024, 1e3 * percentile(load.law_s, 50)]
        figures += [1e3 * percentile(load.step_s[place], 50) for place in (FUNCTION, ACTOR)]
        figures.append(1e3 * percentile(load.step_s[ACTOR], 99))
        table.add_row(law, f"{load.case.layers} x {load.case.experts}", *map(three_digits, figures))
    return table


def _round_table(measured: ControlMeasurement) -> Table:
    columns = ("ranks", "step\nms", "step\np99 ms", *(f"{phase}\nms" for phase in PHASES), *MODEL_COLUMNS)
    title = "A step, from the counts to the bias on all ranks; modelled as tree and as ring"
    table = new_table(columns, title=title, **LOOK)
    modelled = {row.world_size: row for row in measured.modelled}
    rounds = {row.world_size: row for row in measured.ranks.rounds}
    for size in sorted({*modelled, *rounds}):
        cells = _measured_cells(rounds[size]) if size in rounds else ["modelled", *[""] * (1 + len(PHASES))]
        table.add_row(str(size), *cells, *_modelled_cells(modelled.get(size)))
    return table


def _measured_cells(samples: RoundSamples) -> list[str]:
    figures = [percentile(samples.seconds, share) for share in (50, 99)]
    figures += [percentile(samples.phases[phase], 50) for phase in PHASES]
    return [three_digits(1e3 * seconds) for seconds in figures]


def _modelled_cells(row: Modelled | None) -> list[str]:
    if row is None:  # one rank: nobody to sum with
        return [""] * 4
    figures = (1e3 * row.tree_s, 1e3 * row.ring_s, row.sent_bytes / 1024)
    return [three_digits(figure) for figure in figures]


def _note(measured: ControlMeasurement) -> str:
    assert measured.hop is not None  # noqa: S101 - the caller has checked
    return MODEL_NOTE.format(
        alpha=three_digits(1e6 * measured.hop.alpha_s),
        beta=three_digits(1e6 * 2**20 * measured.hop.beta_s),
        cores=usable_cores(),
    )
