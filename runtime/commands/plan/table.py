"""A plan as text for the terminal."""

import textwrap
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from dispatch.exchange.registry import BACKENDS
from runtime.commands.plan.activations import total
from runtime.commands.plan.fit import Fit
from runtime.commands.plan.plan import Plan, ways_out
from runtime.settings.states import PIECES
from runtime.terminal.quantities import byte_size, counted, short
from runtime.terminal.tables import new_table

RECOMPUTED = {
    "none": "no recompute",
    "attention": "attention recomputed",
    "experts": "MoE layers recomputed",
    "full": "recompute",
}

WIDTH = 120
NOTE = """\
Of the rank with most experts, on CUDA, under balanced load: imbalance adds rows, at worst every token of the group. At
most: gradients and activations are not all there at the same moment. Besides come the CUDA context, buffers of NCCL and
what the allocator leaves unused. Bytes of the exchanges are those that a rank sends in a step, not those it keeps."""


def print_plan(plan: Plan, memory_gib: float) -> None:
    """Print heading, memory, traffic and the conclusion."""
    console = Console(width=WIDTH, highlight=False)
    for line in _heading(plan):
        console.print(line, markup=False)
    for table in (_memory(plan), _traffic(plan)):
        console.print()
        console.print(table)
    console.print()
    console.print(textwrap.fill(" ".join(NOTE.split()), WIDTH), markup=False)
    console.print()
    console.print(textwrap.fill(conclusion(plan, memory_gib), WIDTH), markup=False)


def print_fit(fit: Fit) -> None:
    """Print what was tried, one saving more each time, and the settings of the plan."""
    tried = ", ".join(f"{name} {byte_size(size)}" for name, size in fit.tried.items())
    text = (
        f"Tried, each with all before it and the EP size that takes least: {tried}. Of the EP sizes that fit, the plan "
        "has the one with which a rank sends least."
    )
    console = Console(width=WIDTH, highlight=False)
    console.print(textwrap.fill(text, WIDTH), markup=False)
    console.print(f"Settings: {fit.options}", markup=False, soft_wrap=True)


def conclusion(plan: Plan, memory_gib: float) -> str:
    """Whether it fits and, where it does not, what is large and what would help."""
    limit, needed = memory_gib * 2**30, plan.peak_bytes
    if needed <= limit:
        return f"Fits in {memory_gib:g} GiB: yes, {byte_size(needed)}."
    largest = ", ".join(f"{name} {byte_size(size)}" for name, size in plan.largest_parts()[:3])
    parts = [f"Fits in {memory_gib:g} GiB: no, {byte_size(needed)}; the largest parts: {largest}."]
    ways = ways_out(plan)
    if ways:
        parts.append("It would be " + ", ".join(f"{byte_size(way.peak_bytes)} with {name}" for name, way in ways) + ".")
    if all(way.peak_bytes > limit for _, way in ways):
        parts.append("That is not enough; shorter sequences (--seq-len) take less still.")
    return " ".join(parts)


def _heading(plan: Plan) -> Iterator[str]:
    config, subject = plan.subject.config, plan.subject
    world_size = config.cluster.num_workers
    ep_size = config.parallel.resolve(world_size)
    moe = config.model.moe
    yield (
        f"{subject.name}: {_billions(plan.size.total)} parameters, {_billions(plan.size.active)} of them active; "
        f"{moe.num_experts} experts, top-{moe.top_k}"
    )
    num_micro = config.num_micro_batches
    sequences = config.sequences_per_rank // num_micro
    yield (
        f"{world_size} ranks, {subject.ranks_per_node} a node; {ep_size} share the experts, "
        f"{plan.num_local_experts} of each layer on a rank; "
        f"each expert is on {counted(config.dp_size // ep_size, 'rank')}"
    )
    yield (
        f"{config.run.global_batch_size} sequences of {config.model.max_seq_len} tokens a step, {num_micro} micro-batch"
        f"{'es' * (num_micro > 1)} of {sequences} on a rank; {config.run.dtype}, "
        f"{RECOMPUTED[config.model.recompute]}; sharded: {config.parallel.shard}"
        f"{f', in {config.parallel.replicate} replicas' if config.parallel.replicate > 1 else ''}"
    )
    if (stage := plan.stage) is not None:
        layers = ", ".join(f"{part.start} to {part.stop - 1}" for part in stage.layers)
        yield (
            f"Pipeline of {config.parallel.pipeline.size}: of rank {stage.pp_rank} in it, that needs most, with layers "
            f"{layers} and {counted(stage.in_flight, 'forward')} under way at most"
        )
    if config.parallel.context > 1:
        yield f"{config.parallel.context} ranks share each sequence; counted is the last of them, which keeps most keys"
    yield from (f"{note}." for note in subject.notes)


def _memory(plan: Plan) -> Table:
    counts, experts = plan.counts, plan.rank_experts
    table = new_table(("of a rank", "dense", "experts", "together"))
    table.add_row("parameters", *map(_billions, (counts.dense, experts, counts.dense + experts)))
    state_label = plan.subject.config.optim.entry.state_label
    for name, held in plan.state.items():
        _add(table, name if name in (state_label, PIECES) else f"{name}, fp32", (*held, sum(held)))
    _add(table, "state", (*plan.states, plan.state_bytes), style="bold")
    for name, saved in plan.saved.items():
        _add(table, f"activations, {name}", (None, None, saved))
    _add(table, "activations kept for backward", (None, None, total(plan.saved)), style="bold")
    for name, scratch in plan.scratch.items():
        _add(table, f"scratch {name}", (None, None, scratch))
    _add(table, "a bucket of gradients, when activations are gone", (None, None, plan.bucket_bytes))
    _add(table, "peak, at most", (None, None, plan.peak_bytes), style="bold")
    if sum(plan.on_host):
        _add(table, f"{state_label}, in host memory", (*plan.on_host, sum(plan.on_host)))
    return table


def _traffic(plan: Plan) -> Table:
    table = new_table(("sent by a rank in a step", "network", "in the node", "together"))
    for exchange, traffic in plan.traffic.items():
        chosen = exchange == plan.exchange
        style = "bold" if chosen else None
        kind = "all-to-all, a row for each" if BACKENDS[exchange].automatic else "exchange"
        label = f"{kind} {exchange}{' (chosen)' * chosen}"
        for way, links in (("forward", traffic.forward), ("backward", traffic.backward), ("", traffic.total)):
            _add(table, f"{label}{', ' * bool(way)}{way}", (links.network, links.node, links.total), style=style)
    if plan.keys_bytes:
        _add(table, "keys and values of shared sequences, and their gradients", (None, None, plan.keys_bytes))
    for name, size in plan.gradients.items():
        label = "gradients" if plan.subject.config.parallel.shard == "none" else "gradients and gathers"
        _add(table, f"sum of {label}, {name}, by a ring", (None, None, size))
    if plan.stage is not None:
        _add(table, "activations and their gradients, to other stages", (None, None, plan.stage.message_bytes))
    return table


def _add(table: Table, label: str, sizes: Iterable[float | None], style: str | None = None) -> None:
    table.add_row(label, *("" if size is None else byte_size(size) for size in sizes), style=style)


def _billions(count: float) -> str:
    """As papers write parameter counts: 671B."""
    return short(count).replace("G", "B")
