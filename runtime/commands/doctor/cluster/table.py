"""A survey of a cluster as text."""

from collections import Counter
from collections.abc import Iterator, Sequence

from runtime.commands.doctor.cluster.judge import Finding, slow_links
from runtime.commands.doctor.cluster.survey import DRIVER, Link, NodeFacts, Space, Survey
from runtime.terminal.quantities import counted, milliseconds, short

MAX_WIDE = 12  # nodes in a square table; beyond, only its slow pairs are listed


def as_text(survey: Survey, findings: Sequence[Finding]) -> str:
    """Format nodes, links, groups and findings."""
    return "\n".join([*_nodes(survey), *_links(survey), *_ranks(survey), "", *_findings(findings)])


def _nodes(survey: Survey) -> Iterator[str]:
    count = len(survey.nodes) - 1 + len(survey.unreachable)
    yield counted(count, "node")
    for node, facts in survey.nodes.items():
        if node == DRIVER and count:
            continue
        yield f"  {node:15}  {_machine(facts)}; {_clock(survey, node)}"
    for node in survey.unreachable:
        yield f"  {node:15}  does not answer"
    versions = survey.nodes[DRIVER].versions
    yield "driver: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    yield "        " + ", ".join(f"{path} {_space(disk)}" for path, disk in survey.nodes[DRIVER].disks.items())


def _machine(facts: NodeFacts) -> str:
    devices = Counter(device["name"] for device in facts.devices)
    named = ", ".join(f"{count} x {name}" for name, count in devices.items()) or "no GPU"
    return f"{facts.host}: {facts.num_cores} cores, {named}, memory {_space(facts.memory)}, shm {_space(facts.shm)}"


def _clock(survey: Survey, node: str) -> str:
    clock = survey.clocks.get(node)
    if clock is None:
        return "clock not read"
    return f"clock {clock.offset_s * 1e3:+.1f} ms (± {clock.error_s * 1e3:.1f})"


def _space(space: Space) -> str:
    return f"{space.free / 2**30:.1f} of {space.total / 2**30:.1f} GiB free"


def _links(survey: Survey) -> Iterator[str]:
    if not survey.links:
        return
    slow = slow_links(survey.links)
    cells = {(link.sender, link.receiver): _cell(link) + "*" * (link in slow) for link in survey.links}
    names = sorted({name for pair in cells for name in pair})
    yield "from row to column over TCP, one stream: rate and latency; * slow"
    if len(names) > MAX_WIDE:
        marked = sorted({name for link in slow for name in (link.sender, link.receiver)})
        yield f"  of {len(names)} nodes {len(marked)} have a slow link" + ":" * bool(marked)
        names = marked[:MAX_WIDE]
    if not names:
        return
    width = max(map(len, [*cells.values(), *names]))
    for a in ["", *names]:
        row = names if not a else ["-" if a == b else cells.get((a, b), "none") for b in names]
        yield "  " + "  ".join(text.ljust(width) for text in [a, *row]).rstrip()


def _cell(link: Link) -> str:
    if link.error:
        return "none"
    return f"{short(link.bytes_per_s)}B/s {_latency(link.latency_s)}"


def _latency(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else milliseconds(seconds)


def _ranks(survey: Survey) -> Iterator[str]:
    if not survey.rank_nodes:
        return
    nodes = Counter(survey.rank_nodes)
    where = ", ".join(f"{count} on {node}" for node, count in nodes.items())
    yield f"{len(survey.rank_nodes)} ranks on {survey.device} joined in {milliseconds(survey.join_s)}: {where}"
    for group in survey.groups:
        yield (
            f"  expert-parallel group of ranks {group.ranks[0]} to {group.ranks[-1]}: all-to-all "
            f"{_latency(group.small_s)}, {short(group.bytes_per_s)}B/s sent by a rank"
        )


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        yield "nothing wrong was found"
    for finding in findings:
        yield f"{finding.severity}: {finding.subject}: {finding.problem}"
        yield f"  → {finding.advice}"
