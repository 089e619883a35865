"""Simulates the laws on all traces, prints the results, and writes figures and pictures."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dispatch.errors import InvalidValue
from runtime.commands.bench.balance.verdict import TUNED, Verdict, verdicts
from runtime.commands.replay.chart import write_chart
from runtime.commands.replay.comparison import Comparison, compare
from runtime.commands.replay.replay import one_thread, simulate_with_progress
from runtime.commands.replay.score_trace import RecordedTrace
from runtime.commands.replay.simulation import RouterSimulation
from runtime.commands.replay.specs import parse_law
from runtime.commands.replay.table import as_table
from runtime.commands.replay.trace import Trace
from runtime.commands.results import write_json
from runtime.runs.run_dir import find_run
from runtime.terminal.quantities import three_digits
from runtime.terminal.tables import new_table

BEST = "adaptive"
# Laws at their default rates, except smebu, whose published rate is meant for ten times the steps.
DEFAULT_LAWS = ("none", *TUNED, "proportional", "rms", "smebu:rate=0.01", "quantile", "newton", "warm", BEST)


def run_benchmark(
    num_seeds: int, num_steps: int, runs: Sequence[str], first: int | None, laws: Sequence[str], out: Path
) -> int:
    """Simulate all laws on every trace and show the results. Returns the exit code: 0, even if a goal is missed.

    first: training step from which the runs are used a second time; None for once alone.

    Raises:
        InvalidValue: a law or a run is wrong, or there is `first` without a run.
    """
    if first is not None and not runs:
        raise InvalidValue(f"--first {first} is a step of recorded runs; name them by --run RUN, or leave --first out")
    chosen = {spec: parse_law(spec) for spec in (*DEFAULT_LAWS, *laws)}
    traces: list[Trace] = [RecordedTrace(find_run(name)) for name in runs]
    traces += [RecordedTrace(find_run(name), first=first) for name in runs if first is not None]
    shift = num_steps * 5 // 8
    traces += [RouterSimulation(seed=seed, num_steps=num_steps, shift_step=shift) for seed in range(num_seeds)]
    if not traces:
        raise InvalidValue("--seeds 0 leaves nothing to play on; give a run with recorded scores by --run RUN")
    console = Console(highlight=False)
    comparisons = []
    for trace in traces:
        fit = {spec: law for spec, law in chosen.items() if trace.router.num_groups == 1 or law.entry.group_limited}
        with one_thread():
            comparison = compare(trace, simulate_with_progress(trace, fit))
        comparisons.append(comparison)
        console.print(as_table(comparison))
        console.print()
        write_chart(comparison, out / f"{_slug(trace.name)}.png")
    found = [verdict for comparison in comparisons for verdict in verdicts(comparison, BEST)]
    console.print(_as_table(found))
    _write(out / "balance.json", comparisons, found)
    return 0


def _as_table(found: Sequence[Verdict]) -> Table:
    heads = ("claim", "trace", BEST, "sign", "times", "")
    table = new_table(heads, left=(0, 1), wrap=(0, 1), header_style="dim", title=f"law {BEST}", title_justify="left")
    for verdict in sorted(found, key=lambda each: each.claim):
        times = f"{'> ' if verdict.at_least else ''}{three_digits(verdict.times)}"
        mark = "[green]reached[/]" if verdict.reached else "[red]missed[/]"
        table.add_row(verdict.claim, verdict.trace, _shown(verdict.ours), _shown(verdict.theirs), times, mark)
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "never"
    return str(value) if isinstance(value, int) else three_digits(value)


def _write(record: Path, comparisons: Sequence[Comparison], found: Sequence[Verdict]) -> None:
    values = {"traces": [each.to_json() for each in comparisons], "verdicts": [asdict(each) for each in found]}
    write_json(record, values)
    sys.stdout.write(f"\n{record}\n{record.parent}/*.png\n")


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").replace("--", "-")
