"""Measures the links between all pairs of nodes: several pairs at a time, then those that seem slow again, alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.commands.doctor.cluster.judge import slow_links
from runtime.commands.doctor.cluster.pairs import rounds
from runtime.commands.doctor.cluster.probes import ProbedNode, answers_of
from runtime.commands.doctor.cluster.survey import Link

LISTEN_S = 10.0
PAIR_S = 6.0
AGAIN_S = 12.0  # For all second measurements together.


def measure_links(nodes: Sequence[ProbedNode], say: Callable[[str], None]) -> tuple[Link, ...]:
    """Measure both directions of every pair of nodes. A node that stops answering is not asked again."""
    if len(nodes) < 2:
        return ()
    ports, silent = answers_of({node.name: node.probe.listen.remote(node.ip) for node in nodes}, LISTEN_S)
    links = _Links(nodes, ports, silent)
    plan = rounds(len(nodes))
    for number, pairs in enumerate(plan, 1):
        say(f"measuring pairs of nodes, round {number} of {len(plan)}")
        links.measure(pairs)
    links.measure_again(say)
    return links.results()


@dataclass
class _Links:
    """Links measured so far. ports: of the probes, by node name. lost: the nodes that stopped answering, and why."""

    nodes: Sequence[ProbedNode]
    ports: Mapping[str, int]
    lost: dict[str, str]
    found: dict[tuple[str, str], Link] = field(default_factory=dict)

    def measure(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Measure pairs, by the number of their nodes, at the same time. The better of two measurements counts."""
        node_pairs = [(self.nodes[a], self.nodes[b]) for a, b in pairs]
        node_pairs = [(a, b) for a, b in node_pairs if not {a.name, b.name} & self.lost.keys()]
        asked = {a.name: a.probe.measure.remote(b.ip, self.ports[b.name], PAIR_S) for a, b in node_pairs}
        answers, silent = answers_of(asked, 2 * PAIR_S)
        self.lost |= silent  # its probe is still busy: it would hold up the rounds to come
        for a, b in node_pairs:
            if a.name in answers:
                for link in _both_ways(a.name, b.name, answers[a.name]):
                    before = self.found.get((link.sender, link.receiver), link)
                    self.found[link.sender, link.receiver] = max(link, before, key=lambda each: each.bytes_per_s)

    def measure_again(self, say: Callable[[str], None]) -> None:
        """Measure links that seem slow once more, one at a time; first those that are nearly fast enough."""
        slow = sorted(slow_links(list(self.found.values())), key=lambda link: -link.bytes_per_s)
        number = {node.name: place for place, node in enumerate(self.nodes)}
        pairs = list(dict.fromkeys(tuple(sorted((number[link.sender], number[link.receiver]))) for link in slow))
        deadline = time.monotonic() + AGAIN_S
        for place, (a, b) in enumerate(pairs, 1):
            if time.monotonic() > deadline:
                break
            say(f"measuring pairs that seem slow once more, {place} of {len(pairs)}")
            self.measure([(a, b)])

    def results(self) -> tuple[Link, ...]:
        """Every link, with the reason for those that were not measured."""
        missing = [
            Link(sender=a.name, receiver=b.name, error=f"not measured: {name}: {reason}")
            for name, reason in self.lost.items()
            for a in self.nodes
            for b in self.nodes
            if a.name == name != b.name and not {(a.name, b.name), (b.name, a.name)} & self.found.keys()
        ]
        return (*self.found.values(), *missing)


def _both_ways(a: str, b: str, answer: Mapping[str, Any]) -> list[Link]:
    if "error" in answer:
        return [Link(sender=a, receiver=b, error=answer["error"])]
    latency_s = answer["latency_s"]
    return [
        Link(sender=a, receiver=b, latency_s=latency_s, bytes_per_s=answer["out_bytes_per_s"]),
        Link(sender=b, receiver=a, latency_s=latency_s, bytes_per_s=answer["in_bytes_per_s"]),
    ]
