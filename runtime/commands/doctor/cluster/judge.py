"""Decides what is wrong with a cluster and what to do about it. Pure: a function of the survey."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.gang.preflight import size_text
from cluster.ray.local_ray import OBJECT_STORE_BYTES
from runtime.commands.doctor.cluster.survey import DRIVER, Link, NodeFacts, Survey
from runtime.terminal.quantities import milliseconds, short

Severity = Literal["error", "warning"]

# Of the rate that most pairs reach. A link that fell back to a slower standard is at a tenth; half may be traffic.
SLOW_SHARE, VERY_SLOW_SHARE = 0.5, 0.25
MANY_PAIRS = 3  # With more slow pairs than this, one finding names them all.
SLOW_LATENCY, SLOW_LATENCY_S = 5.0, 1e-3  # times the usual one, and at least this long: less is noise
MAX_CLOCK_S = 0.5  # Events of several nodes, and the cause of a failure, are ordered by time.
MIN_DISK_BYTES = 2**30
MAX_DISK_SHARE = 0.95  # Above it Ray stops writing objects to disk.
MIN_SHM_BYTES = 256 * 2**20  # NCCL takes some 10 MiB a rank; a container has 64 MiB unless told otherwise.
MIN_MEMORY_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding with advice. An error would stop or spoil a run, a warning may."""

    severity: Severity
    subject: str
    problem: str
    advice: str


def judge(survey: Survey) -> list[Finding]:
    """Return all findings, errors first."""
    found = [
        *_unreachable(survey),
        *_versions(survey.nodes),
        *_sources(survey.nodes),
        *_devices(survey.nodes),
        *_space(survey.nodes),
        *_clocks(survey),
        *_links(survey.links),
        *_groups(survey),
    ]
    return sorted(found, key=lambda finding: finding.severity != "error")


def usual(values: Sequence[float]) -> float:
    """The 75th percentile: the rate of good links.

    The median would not do: with three nodes, one bad node is part of two of the three pairs.
    """
    return sorted(values)[math.ceil(0.75 * len(values)) - 1]


def slow_links(links: Sequence[Link]) -> list[Link]:
    """Select the links below half of the usual rate."""
    working = [link for link in links if not link.error]
    if not working:
        return []
    limit = SLOW_SHARE * usual([link.bytes_per_s for link in working])
    return [link for link in working if link.bytes_per_s < limit]


def _unreachable(survey: Survey) -> Iterator[Finding]:
    for node, reason in survey.unreachable.items():
        yield Finding(
            severity="error",
            subject=node,
            problem=f"does not answer: {reason}",
            advice="see whether the machine is up, its link and firewall, and `ray status`; restart Ray there",
        )


def _versions(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    for name in sorted({name for facts in nodes.values() for name in facts.versions}):
        # A machine without GPUs has no NCCL: no difference to speak of.
        value_by_node = {node: facts.versions[name] for node, facts in nodes.items() if name in facts.versions}
        yield from _differences(value_by_node, name, f"install the same {name} everywhere")


def _sources(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    for package in sorted({package for facts in nodes.values() for package in facts.sources}):
        value_by_node = {node: facts.sources.get(package, "missing") for node, facts in nodes.items()}
        advice = "copy the same tree to every node, or start the run with `ray job submit --working-dir`"
        yield from _differences(value_by_node, f"Trimtab's source in {package}/", advice)


def _differences(value_by_node: Mapping[str, str], what: str, advice: str) -> Iterator[Finding]:
    counts = Counter(value_by_node.values())
    # In a tie the value of the driver is the expected one: the run's settings are checked there.
    expected = max(counts, key=lambda value: (counts[value], value == value_by_node.get(DRIVER)))
    for node, value in value_by_node.items():
        if value != expected:
            problem = f"{what} is {value}, elsewhere {expected}"
            yield Finding(severity="error", subject=node, problem=problem, advice=advice)
    if expected == "missing" and len(counts) == 1:
        yield Finding(severity="error", subject="all nodes", problem=f"{what} is missing", advice=advice)


def _devices(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    kinds = {
        node: ", ".join(f"{count} x {name}" for name, count in Counter(d["name"] for d in facts.devices).items())
        for node, facts in nodes.items()
        if node != DRIVER
    }
    counts = Counter(kinds.values())
    if len(counts) > 1:
        expected = max(counts, key=lambda kind: counts[kind])
        for node, kind in kinds.items():
            if kind != expected:
                yield Finding(
                    severity="warning",
                    subject=node,
                    problem=f"has {kind or 'no GPU'}, other nodes {expected or 'none'}",
                    advice="ranks wait for the slowest: give a run nodes of one kind",
                )


def _space(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    for node, facts in nodes.items():
        for path, disk in facts.disks.items():
            used = 1 - disk.free / disk.total if disk.total else 1.0
            if disk.free < MIN_DISK_BYTES or used > MAX_DISK_SHARE:
                yield Finding(
                    severity="error",
                    subject=node,
                    problem=f"the disk of {path} has {size_text(disk.free)} free and is {used:.0%} full",
                    advice=f"free some: checkpoints need at least {size_text(MIN_DISK_BYTES)}, and above "
                    f"{MAX_DISK_SHARE:.0%} Ray refuses objects",
                )
        shm = facts.shm
        if shm.total < MIN_SHM_BYTES or shm.free < OBJECT_STORE_BYTES:
            yield Finding(
                severity="error",
                subject=node,
                problem=f"/dev/shm has {size_text(shm.free)} free of {size_text(shm.total)}",  # noqa: S108 A name.
                advice="start the container with --shm-size=1g, or `mount -o remount,size=1G /dev/shm`; Ray's object "
                "store and NCCL live there",
            )
        if facts.memory.free < MIN_MEMORY_BYTES:
            yield Finding(
                severity="error",
                subject=node,
                problem=f"{size_text(facts.memory.free)} of {size_text(facts.memory.total)} of memory are free",
                advice="end what else runs there: the kernel would kill a worker",
            )


def _clocks(survey: Survey) -> Iterator[Finding]:
    for node, clock in survey.clocks.items():
        if abs(clock.offset_s) - clock.error_s > MAX_CLOCK_S:
            yield Finding(
                severity="error",
                subject=node,
                problem=f"its clock is {abs(clock.offset_s):.2f} s {'ahead' if clock.offset_s > 0 else 'behind'}",
                advice="turn on time synchronisation there (chrony, or `timedatectl set-ntp true`): events and "
                "failures are ordered by time",
            )


def _links(links: Sequence[Link]) -> Iterator[Finding]:
    for link in links:
        if link.error:
            yield Finding(
                severity="error",
                subject=f"{link.sender} to {link.receiver}",
                problem=f"no connection: {link.error}",
                advice="open all TCP ports between the nodes: collectives choose theirs freely",
            )
    yield from _slow(links)
    working = [link for link in links if not link.error]
    if working:
        limit_s = max(SLOW_LATENCY * sorted(link.latency_s for link in working)[len(working) // 4], SLOW_LATENCY_S)
        for link in working:
            if link.latency_s > limit_s:
                yield Finding(
                    severity="warning",
                    subject=f"{link.sender} to {link.receiver}",
                    problem=f"latency {milliseconds(link.latency_s)}, usually below {milliseconds(limit_s)}",
                    advice="see whether this path crosses another site or a busy switch",
                )


def _slow(links: Sequence[Link]) -> Iterator[Finding]:
    """A finding for each node that is slow with all others. Of other slow pairs one each, or one for all if many."""
    slow = slow_links(links)
    if not slow:
        return
    rate_of_others = usual([link.bytes_per_s for link in links if not link.error])
    reached = f"others reach {short(rate_of_others)}B/s"
    explained: list[Link] = []
    for node in sorted({name for link in slow for name in (link.sender, link.receiver)}):
        sent = _all_slow([link for link in links if link.sender == node], slow)
        received = _all_slow([link for link in links if link.receiver == node], slow)
        if not sent and not received:
            continue
        explained += sent + received
        verbs = " and ".join(["sends"] * bool(sent) + ["receives"] * bool(received))
        rate = max(link.bytes_per_s for link in sent + received)
        yield Finding(
            severity=_severity(rate, rate_of_others),
            subject=node,
            problem=f"{verbs} {short(rate)}B/s at most, with every other node; {reached}",
            advice="its own link is slow: check cable, port, driver and what else uses it",
        )
    rest = [link for link in slow if link not in explained]
    if len(rest) > MANY_PAIRS:
        yield _many_pairs(rest, len(links), rate_of_others, reached)
        return
    for link in rest:
        yield Finding(
            severity=_severity(link.bytes_per_s, rate_of_others),
            subject=f"{link.sender} to {link.receiver}",
            problem=f"{short(link.bytes_per_s)}B/s, {reached}",
            advice="only this pair is slow: check the switches between the two, or leave one of them out",
        )


def _many_pairs(slow: Sequence[Link], num_links: int, rate_of_others: float, reached: str) -> Finding:
    slowest, *_, fastest = sorted(slow, key=lambda link: link.bytes_per_s)
    return Finding(
        severity=_severity(slowest.bytes_per_s, rate_of_others),
        subject=f"{len(slow)} of {num_links} links",
        problem=f"{short(slowest.bytes_per_s)}B/s ({slowest.sender} to {slowest.receiver}) to "
        f"{short(fastest.bytes_per_s)}B/s, {reached}",
        advice="they have no node in common: see what else uses the network and the processors, then the switches; "
        "the table marks them",
    )


def _severity(rate: float, rate_of_others: float) -> Severity:
    return "error" if rate < VERY_SLOW_SHARE * rate_of_others else "warning"


def _all_slow(links: list[Link], slow: Sequence[Link]) -> list[Link]:
    """A node's links in one direction if it has several and all are slow, else none."""
    working = [link for link in links if not link.error]
    return working if len(working) > 1 and all(link in slow for link in working) else []


def _groups(survey: Survey) -> Iterator[Finding]:
    if survey.gang_error:
        yield Finding(
            severity="error",
            subject="process group",
            problem=survey.gang_error,
            advice="settle what else is found here first; if nothing else is, name the network interface by "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
    if not survey.groups:
        return
    rate_of_others = usual([group.bytes_per_s for group in survey.groups])
    for group in survey.groups:
        if survey.device == "cpu" and len(group.nodes) == 1:
            continue  # It crosses no link: its rate says what else used the cores.
        if group.bytes_per_s < SLOW_SHARE * rate_of_others:
            yield Finding(
                severity=_severity(group.bytes_per_s, rate_of_others),
                subject=f"expert-parallel group of ranks {group.ranks[0]} to {group.ranks[-1]}",
                problem=f"all-to-all sends {short(group.bytes_per_s)}B/s a rank, others {short(rate_of_others)}B/s",
                advice=f"its nodes are {', '.join(group.nodes)}: see the links between them",
            )
