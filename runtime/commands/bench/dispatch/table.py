"""The figures of `trimtab bench dispatch` as text for the terminal."""

from collections.abc import Iterator

from runtime.commands.bench.dispatch.case import LayerCase
from runtime.commands.bench.dispatch.figures import LayerFigures, Pair
from runtime.terminal.quantities import counted, percent, three_digits

MIB, GIB = 2**20, 2**30
NOTE = """\
Bare: the six matmuls of every expert on balanced rows, and an all-to-all of the layer's own messages, nothing around
either. Medians of the rounds; ratios are taken inside a round. Wall time is the slowest rank's, memory the largest of
a rank above weights and inputs, all else the mean of the ranks."""
LABELS = {"rest": "rest: router, autograd, waiting"}
LINKS = {"node": "inside the node", "network": "between nodes"}


def as_text(case: LayerCase, exchange: str, figures: dict[str, LayerFigures]) -> str:
    """Format the heading, and for each dtype a table and a closing sentence."""
    parts = [_heading(case, exchange)]
    for dtype, each in figures.items():
        parts.append("\n".join([*_phases(dtype, each), "", *_limits(case, each), "", closing_sentence(dtype, each)]))
    return "\n\n".join([*parts, NOTE]) + "\n"


def closing_sentence(dtype: str, figures: LayerFigures) -> str:
    """Say in a sentence what share of the step the bare matmuls and the bare all-to-all would take."""
    shares = figures.shares
    known = f"bare matmuls {percent(shares['matmul'])}, bare all-to-all {percent(shares['wire'])}"
    if shares["rest"] < 0:
        return f"{dtype}, of the step: {known}, together more than it takes: they overlap, or the machine is too busy."
    return f"{dtype}, of the step: {known}, the rest {percent(shares['rest'])}."


def describe(case: LayerCase, exchange: str) -> tuple[str, str]:
    """Describe the measured layer in two lines."""
    shape = case.shape
    sizes = f"{shape.tokens} tokens a rank, hidden {shape.hidden}, ffn_hidden {shape.ffn_hidden}, "
    sizes += f"{shape.num_experts} experts, top-{shape.top_k}"
    threads = f"{counted(case.threads, 'thread')} each"
    chosen = f"{exchange} (auto)" if case.exchange == "auto" and exchange != "none" else exchange
    choices = f"workload {case.workload}" if case.workload else "random tokens"
    if case.skew is not None:
        choices += f" with skew {case.skew:g}"
    where = f"{counted(case.workers, 'worker')} on {case.device}, {threads}, exchange {chosen}"
    chunks = f", {case.num_chunks} chunks" if case.num_chunks > 1 else ""
    return sizes, f"{where}, payload {case.payload}{chunks}, {choices}, {case.rounds} rounds"


def _heading(case: LayerCase, exchange: str) -> str:
    return "\n".join(("MoE layer, forward and backward", *describe(case, exchange)))


def _phases(dtype: str, figures: LayerFigures) -> Iterator[str]:
    yield f"{dtype:<34}{'ms':>10}{'of the step':>14}"
    step_s = figures.wall.measured
    for phase, seconds in figures.phases.items():
        yield f"  {LABELS.get(phase, phase):<32}{1e3 * seconds:>10.1f}{percent(seconds / step_s):>14}"
    yield f"  {'step, wall time':<32}{1e3 * step_s:>10.1f}{percent(1.0):>14}"


def _limits(case: LayerCase, figures: LayerFigures) -> Iterator[str]:
    yield _row("", "layer", "bare", "layer / bare")
    yield _row("wall ms, beside matmuls", *_scaled(figures.wall, 1e-3))
    yield _row("CPU ms of a rank, beside matmuls", *_scaled(figures.cpu, 1e-3))
    yield _row("matmul GF/s, experts phase", *_scaled(figures.flops, 1e9))
    if figures.exchange and figures.bandwidth:
        yield _row("dispatch + combine ms, all-to-all", *_scaled(figures.exchange, 1e-3))
        yield _row("sent GiB/s in dispatch + combine", *_scaled(figures.bandwidth, GIB))
    for name, pair in figures.others.items():
        yield _row(f"wall ms, {name}, beside the layer", *_scaled(pair, 1e-3))
    yield ""
    yield from _amounts(case, figures)


def _amounts(case: LayerCase, figures: LayerFigures) -> Iterator[str]:
    total, floor = sum(figures.sent.values()), figures.floor
    yield _row("a rank sends in a step", "MiB", "least MiB", "sent / least")
    for link, sent in figures.sent.items():
        # Between nodes a token need not go more than once to each; inside one it depends on the exchange.
        least = floor["network"] if link == "network" else None
        yield _row(f"  {LINKS[link]}", _mib(sent), *_least(sent, least))
    yield _row("  together: a row per token and rank", _mib(total), *_least(total, floor["all"]))
    yield ""
    yield _row("peak memory, torch's allocator, MiB", _mib(figures.allocated_bytes))
    if case.device == "cpu":
        resident = figures.resident_bytes
        yield _row("peak memory, resident set, MiB", "n/a" if resident is None else _mib(resident))
    yield _row("busiest expert, x mean", f"{figures.busiest_over_mean:.2f}")


def _least(sent: float, least: float | None) -> tuple[str, ...]:
    return () if least is None else (_mib(least), f"{sent / least:.2f} x" if least else "")


def _mib(num_bytes: float) -> str:
    return three_digits(num_bytes / MIB)


def _scaled(pair: Pair, unit: float) -> tuple[str, str, str]:
    return three_digits(pair.measured / unit), three_digits(pair.bare / unit), f"{pair.ratio:.2f} x"


def _row(label: str, *cells: str) -> str:
    return f"  {label:<36}{''.join(f'{cell:>14}' for cell in cells)}".rstrip()
