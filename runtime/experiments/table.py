"""Laws side by side as a table for the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runtime.experiments.law_figures import SMOOTH_STEPS, Comparison, LawFigures
from runtime.quantities import percent, three_digits


def as_table(comparison: Comparison) -> RenderableType:
    """Heading, one row a law, the floors below, and what the columns mean."""
    has_shift = comparison.shift_step is not None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("law")
    for column in ("MaxVio\nbatch", "MaxVio\nglobal", "steps to\nbalance", *["steps to\nrecover"] * has_shift):
        table.add_column(column, justify="right")
    table.add_column("score\nregret", justify="right")
    for label, law in comparison.laws.items():
        table.add_row(label, *_cells(law, has_shift=has_shift))
    for label, floor in (("practical floor", comparison.practical_floor), ("chance floor", comparison.chance_floor)):
        table.add_row(Text(label, "dim"), Text(three_digits(floor), "dim"))
    first, last = comparison.steps
    return Group(Text(f"{comparison.name}, steps {first} to {last}", "bold"), table, Text(_notes(comparison), "dim"))


def _cells(law: LawFigures, *, has_shift: bool) -> list[str]:
    steps = [law.num_steps_to_balance, *[law.num_steps_to_recover] * has_shift]
    return [
        three_digits(law.max_vio_batch),
        three_digits(law.max_vio_global),
        *("never" if number is None else str(number) for number in steps),
        percent(law.regret),
    ]


def _notes(comparison: Comparison) -> str:
    first, last = comparison.steady
    shift = (
        ""
        if comparison.shift_step is None
        else f"; recover: the same, counted from the shift at step {comparison.shift_step}"
    )
    threshold = three_digits(comparison.threshold)
    return (
        f"MaxVio and regret: steps {first} to {last}, mean of the layers; global: of their summed load. Balance: the "
        f"mean of {SMOOTH_STEPS} steps below {threshold}{shift}. Regret: score that the choice gave away against top-k "
        "without a bias. Floors: what the best constant bias would leave, which does not know the batch; what "
        "independent tokens would by chance."
    )
