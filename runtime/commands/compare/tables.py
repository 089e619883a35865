"""A comparison as text: tables for the terminal and in Markdown, all numbers as JSON."""

import textwrap
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from runtime.commands.compare.chart import write_chart
from runtime.commands.compare.outcome import AVERAGED_STEPS, FLOOR_FACTOR, LAST_SHARE, MethodOutcome, Outcome, SeedStats
from runtime.commands.results import write_json
from runtime.terminal.quantities import milliseconds
from runtime.terminal.tables import new_table

MIN_WIDTH = 150  # of a terminal that is none: a table in a file need not be narrow
Cell = Callable[[SeedStats, int], str]
Rows = list[list[str]]


def print_tables(outcome: Outcome, console: Console) -> None:
    """The tables and what their columns mean."""
    if not console.is_terminal:
        console = Console(file=console.file, width=MIN_WIDTH, highlight=False)
    for heads, rows in _tables(outcome):
        table = new_table(heads, wrap=range(1, len(heads)))
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    console.print(explanation(outcome), markup=False)


def write_results(outcome: Outcome, out: Path) -> list[Path]:
    """Write compare.md, compare.json and compare.png. Returns their paths."""
    paths = [out / f"compare.{suffix}" for suffix in ("md", "json", "png")]
    markdown = "\n".join(_markdown(heads, rows) for heads, rows in _tables(outcome))
    paths[0].write_text(f"{markdown}\n{explanation(outcome)}\n", encoding="utf-8")
    write_json(paths[1], outcome.to_json())
    write_chart(outcome, paths[2])
    return paths


def explanation(outcome: Outcome) -> str:
    """What the columns mean, with the numbers of this comparison."""
    most = max(len(method.seeds) for method in outcome.methods)
    origin = f"{FLOOR_FACTOR} times the lowest that any method held, {outcome.floor:.3f}"
    spread = f"Mean ± standard deviation over {most} seeds" if most > 1 else "Of one seed, so without a deviation"
    sentences = f"""
        {spread}. Perplexity of a token and bits per byte: held-out
        text of all sources after the last step. MaxVio_global: load on that text with the bias of then, as in arXiv
        2408.15664; in the last mix: had its sources the shares that they had in training then. MaxVio_batch: mean of
        the last {100 * LAST_SHARE:.0f} % of the steps; computation batch: of what one
        expert-parallel group computes at once. Steps to balance: until the mean MaxVio_batch of {AVERAGED_STEPS} steps
        is below {outcome.threshold:.3f} ({"as given" if outcome.threshold_given else origin}); {AVERAGED_STEPS} is the
        least. Against the first method: seed by seed."""
    if outcome.shift_at:
        sentences += f""" The mix of the text shifts at step {outcome.shift_at} of {outcome.steps}. To recover: steps
        from there; peak: the highest mean of {AVERAGED_STEPS} steps from there on."""
    return textwrap.fill(" ".join(sentences.split()), 120)


def _tables(outcome: Outcome) -> list[tuple[list[str], Rows]]:
    left_out = set() if outcome.shift_at else set(SHIFT_COLUMNS)
    if not any(method.measures["max_vio_global_in_mix"].num_known for method in outcome.methods):
        left_out.add("max_vio_global_in_mix")
    return [
        _table(outcome, "method", [name for name in RESULT_COLUMNS if name not in left_out]),
        _table(outcome, "MaxVio_batch over the run", [name for name in COURSE_COLUMNS if name not in left_out]),
        _text_table(outcome),
    ]


def _table(outcome: Outcome, corner: str, columns: list[str]) -> tuple[list[str], Rows]:
    rows = [
        [method.spec, *(CELLS[name](method.measures[name], len(method.seeds)) for name in columns)]
        for method in outcome.methods
    ]
    return [corner, *(HEADS[name] for name in columns)], rows


def _text_table(outcome: Outcome) -> tuple[list[str], Rows]:
    """Bits per byte by source, and against the first method."""
    sources = list(outcome.methods[0].per_source)
    rows = [
        [
            method.spec,
            _decimals(4)(method.measures["val_bits_per_byte"], 0),
            *(_decimals(4)(method.per_source[name], 0) for name in sources),
            "" if method is outcome.methods[0] else _signed(method),
        ]
        for method in outcome.methods
    ]
    return ["bits per byte", "all text", *sources, f"all, against {outcome.methods[0].spec}"], rows


def _markdown(heads: list[str], rows: Rows) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _decimals(num_decimals: int) -> Cell:
    def cell(spread: SeedStats, _num_seeds: int) -> str:
        if spread.mean is None:
            return "n/a"
        text = f"{spread.mean:.{num_decimals}f}"
        return text if spread.std is None else f"{text} ± {spread.std:.{num_decimals}f}"

    return cell


def _steps(spread: SeedStats, num_seeds: int) -> str:
    if spread.mean is None:
        return "never"
    text = _decimals(0)(spread, num_seeds)
    return text if spread.num_known == num_seeds else f"{text} ({spread.num_known} of {num_seeds})"


def _time(spread: SeedStats, _num_seeds: int) -> str:
    return "n/a" if spread.mean is None else milliseconds(spread.mean)


def _signed(method: MethodOutcome) -> str:
    spread = method.against_first
    if spread.mean is None:
        return "n/a"
    return f"{spread.mean:+.4f}" + ("" if spread.std is None else f" ± {spread.std:.4f}")


RESULT_COLUMNS = (
    "val_perplexity",
    "max_vio_global",
    "max_vio_global_in_mix",
    "max_vio_batch",
    "max_vio_computation_batch",
    "step_s",
)
COURSE_COLUMNS = (
    "steps_to_balance",
    "max_vio_batch_before_shift",
    "max_vio_batch_peak_after_shift",
    "steps_to_recover",
)
SHIFT_COLUMNS = COURSE_COLUMNS[1:]
CELLS: dict[str, Cell] = {
    **dict.fromkeys((*RESULT_COLUMNS, *COURSE_COLUMNS), _decimals(3)),
    **dict.fromkeys(("steps_to_balance", "steps_to_recover"), _steps),
    "step_s": _time,
}
HEADS = {
    "val_perplexity": "perplexity",
    "max_vio_global": "MaxVio_global",
    "max_vio_global_in_mix": "in the last mix",
    "max_vio_batch": "MaxVio_batch",
    "max_vio_computation_batch": "computation batch",
    "step_s": "step",
    "steps_to_balance": "steps to balance",
    "max_vio_batch_before_shift": "before the shift",
    "max_vio_batch_peak_after_shift": "peak after it",
    "steps_to_recover": "steps to recover",
}
