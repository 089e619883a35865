"""Recomputes the bias of a run, and simulates other laws on the router scores that it recorded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from dispatch.laws import BalanceConfig
from runtime.commands.out import out_dir
from runtime.commands.replay.chart import write_chart
from runtime.commands.replay.comparison import Comparison, compare
from runtime.commands.replay.history import Reproduction, reproduce_bias
from runtime.commands.replay.play import SimulatedLaw, simulate_laws
from runtime.commands.replay.score_trace import NoScoresError, RecordedTrace
from runtime.commands.replay.specs import parse_law
from runtime.commands.replay.starts import read_starts
from runtime.commands.replay.table import as_table
from runtime.commands.replay.trace import Trace
from runtime.commands.results import write_json
from runtime.terminal.say import say

DEFAULT_LAWS = ("sign:u=0.001", "adaptive")  # the published rule as published, and ours


def replay(
    run: Path,
    *,
    laws: Sequence[str],
    threshold: float | None,
    shift: int | None,
    first: int | None,
    out: Path | None,
) -> int:
    """Compute the run's biases again from its loads, simulate other laws on its recorded scores, print and write both.

    Args:
        laws: laws beside the run's own, as on the command line; if empty, DEFAULT_LAWS.
        threshold: the MaxVio_batch that counts as balance; None for 1.5 times the practical floor.
        shift: training step from which the text is another; None for that of the run, if it has one.
        first: training step at which the laws begin, without bias; None for the first recorded one.
        out: folder of replay.json and replay.png; None for that of the run.
    Returns:
        The exit code: 1 where the biases were not reproduced bit for bit.

    Raises:
        InvalidValue: a law, the shift or the first step is wrong, or laws were asked for and the run has no scores.
    """
    chosen = {spec: parse_law(spec) for spec in laws or DEFAULT_LAWS}
    console = Console(highlight=False)
    reproduction = reproduce_bias(run)
    say(console, str(reproduction))
    try:
        trace = RecordedTrace(run, shift, first)
    except NoScoresError as error:
        if laws:
            raise
        say(console, str(error))
        return int(not reproduction.is_exact)
    with one_thread():
        comparison = compare(trace, simulate_with_progress(trace, _with_own(run, chosen)), threshold)
    console.print(as_table(comparison))
    for path in _write(out_dir(out or run), comparison, reproduction, trace):
        say(console, str(path))
    return int(not reproduction.is_exact)


def _with_own(run: Path, chosen: Mapping[str, BalanceConfig]) -> dict[str, BalanceConfig]:
    """The law that the run ended with, then the others, without the one that is the same."""
    own = read_starts(run)[-1].balance
    rate_key = "u" if own.law == "sign" else "rate"  # `parse_law` reads both; u is the name in the sign law's paper
    label = f"{own.law}:{rate_key}={own.rate_at(1):g}, the run's own"
    return {label: own, **{spec: config for spec, config in chosen.items() if not _same(config, own)}}


def _same(left: BalanceConfig, right: BalanceConfig) -> bool:
    """Whether both settings give the same law: a rate of None counts as the law's default."""
    filled = [each if each.needs_horizon else replace(each, rate=each.rate_at(1)) for each in (left, right)]
    return filled[0] == filled[1]


def simulate_with_progress(trace: Trace, laws: Mapping[str, BalanceConfig]) -> dict[str, SimulatedLaw]:
    """`simulate_laws` with a bar on the terminal; schedules of the rate span the trace."""
    num_steps = len(trace.steps)
    laws = {
        label: replace(config, horizon=config.horizon or num_steps) if config.needs_horizon else config
        for label, config in laws.items()
    }
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"simulating {len(laws)} laws", total=num_steps)
        return simulate_laws(trace, laws, lambda step: progress.update(task, completed=step))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread."""
    # Tensors are small here: several threads gain little, and waiting for each other on a busy machine they took ten
    # times as long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(folder: Path, comparison: Comparison, reproduction: Reproduction, trace: RecordedTrace) -> list[Path]:
    """Write replay.json and replay.png. Returns their paths."""
    record, picture = folder / "replay.json", folder / "replay.png"
    values = {"own_bias": asdict(reproduction), "training_steps": trace.training_steps, **comparison.to_json()}
    write_json(record, values)
    write_chart(comparison, picture)
    return [record, picture]
