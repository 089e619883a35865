"""Laws side by side as a table for the terminal."""

from rich.console import Group, RenderableType
from rich.text import Text

from runtime.commands.replay.comparison import BALANCED_AT, Comparison
from runtime.commands.replay.figures import MEAN_OVER, LawFigures
from runtime.terminal.quantities import percent, three_digits
from runtime.terminal.tables import new_table


def as_table(comparison: Comparison) -> RenderableType:
    """Heading, one row a law, the floors below, and what the columns mean."""
    has_shift = comparison.shift_step is not None
    updates = ("steps to\nbalance", *["steps to\nrecover"] * has_shift)
    table = new_table(("law", "MaxVio\nbatch", "MaxVio\nglobal", *updates, "score\nregret"), header_style="dim")
    for label, law in comparison.laws.items():
        table.add_row(label, *_cells(law.figures, has_shift=has_shift))
    for label, floor in comparison.floors.items():
        table.add_row(Text(label, "dim"), Text(three_digits(floor), "dim"))
    first, last = comparison.steps
    return Group(Text(f"{comparison.name}, steps {first} to {last}", "bold"), table, Text(_notes(comparison), "dim"))


def _cells(figures: LawFigures, *, has_shift: bool) -> list[str]:
    updates = [figures.balanced_after, *[figures.recovered_after] * has_shift]
    return [
        three_digits(figures.max_vio_batch),
        three_digits(figures.max_vio_global),
        *("never" if number is None else str(number) for number in updates),
        percent(figures.regret),
    ]


def _notes(comparison: Comparison) -> str:
    first, last = comparison.steady
    shift = comparison.shift_step
    recover = "" if shift is None else f"; to recover: the same, counted from the shift at step {shift}"
    low, high = comparison.threshold_S.min(), comparison.threshold_S.max()
    threshold = (
        three_digits(low)
        if low == high
        else f"{BALANCED_AT:g} times the practical floor of those steps ({three_digits(low)} to {three_digits(high)})"
    )
    return (
        f"MaxVio and regret: steps {first} to {last}, mean of the layers; global: of their summed load. Steps to "
        f"balance: before the first {MEAN_OVER} that are on average within {threshold}, as are most that follow"
        f"{recover}. Regret: score that the choice gives away against top-k without a bias. Floors: what the best "
        "constant bias would leave, which does not know the batch; what independent tokens would leave by chance."
    )
