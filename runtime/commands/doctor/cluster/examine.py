"""Examines a cluster: a probe on every node, then each pair of nodes, then the ranks of a run to come.

Every wait is bounded. A node that once does not answer is reported, and not asked again.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.failures.errors import GangFailed
from cluster.gang.placement import ClusterTooSmall
from runtime.commands.doctor.cluster.links import measure_links
from runtime.commands.doctor.cluster.probe import Probe
from runtime.commands.doctor.cluster.probes import ProbedNode, answers_of, end_probes, start_probes
from runtime.commands.doctor.cluster.survey import DRIVER, Clock, GroupSpeed, NodeFacts, Survey

if TYPE_CHECKING:
    from cluster.gang.gang import Gang
    from runtime.commands.doctor.cluster.ranks import DoctorRank, RankSpeed

ANSWER_S = 30.0  # For a first answer: a Python process, `import torch`, and a node that is busy with that.
CLOCK_S = 5.0
NUM_CLOCKS = 5  # Readings of a clock: the one with the shortest round trip is the most exact.
GROUPS_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What to look at. config: of the cluster, with the ranks of the run to come. paths: whose disks matter."""

    config: ClusterConfig
    ep_size: int
    paths: tuple[str, ...]
    say: Callable[[str], None]


def examine(wanted: Examination) -> Survey:
    """Look at every node of the Ray cluster that this process has joined, and at the ranks that would run there."""
    token = secrets.token_bytes(16)
    nodes, unreachable = start_probes(token)
    try:
        survey = _with_nodes(nodes, Probe(token), wanted)
    finally:
        end_probes(nodes)
    wanted.say(f"starting {wanted.config.num_workers} ranks")
    return _with_ranks(replace(survey, unreachable=unreachable | dict(survey.unreachable)), wanted)


def _with_nodes(nodes: list[ProbedNode], own: Probe, wanted: Examination) -> Survey:
    """Ask the probes, and `own`, the probe of this process."""
    wanted.say("looking at the nodes")
    asked = {node.name: node.probe.facts.remote(wanted.paths) for node in nodes}
    facts = {DRIVER: NodeFacts.of(own.facts(wanted.paths))}
    answers, silent = answers_of(asked, ANSWER_S)
    facts |= {name: NodeFacts.of(answer) for name, answer in answers.items()}
    nodes = [node for node in nodes if node.name in answers]
    wanted.say("comparing clocks")
    clocks = {node.name: clock for node in nodes if (clock := _clock(node)) is not None}
    return Survey(nodes=facts, unreachable=silent, clocks=clocks, links=measure_links(nodes, wanted.say))


def _clock(node: ProbedNode) -> Clock | None:
    best: Clock | None = None
    for _ in range(NUM_CLOCKS):
        before_s = time.time()
        answers, _ = answers_of({node.name: node.probe.now_s.remote()}, CLOCK_S)
        after_s = time.time()
        if not answers:
            return best
        # As NTP does: the answer is taken to be of the middle of the round trip, and is wrong by half of it at most.
        clock = Clock(offset_s=answers[node.name] - (before_s + after_s) / 2, error_s=(after_s - before_s) / 2)
        if best is None or clock.error_s < best.error_s:
            best = clock
    return best


def _with_ranks(survey: Survey, wanted: Examination) -> Survey:
    from cluster.gang.gang import Gang

    config, ep_size = wanted.config, wanted.ep_size
    try:
        with Gang.launch(config, _rank_maker(ep_size, config.device), ep_size_of=lambda _: ep_size) as gang:
            wanted.say(f"exchanging bytes between {gang.world_size} ranks")
            speeds: list[RankSpeed] = gang.run("measure", GROUPS_S, limit_s=config.collective_timeout_s + 2 * GROUPS_S)
            return replace(
                survey,
                groups=_groups(gang, speeds, ep_size) if ep_size > 1 else (),
                rank_nodes=tuple(row.ip for row in gang.rank_map),
                device=speeds[0].device,
                join_s=gang.startup_s["join"],
            )
    except ClusterTooSmall as error:
        return replace(survey, gang_error=str(error))
    except GangFailed as error:
        fates = [f"{failure.where} {failure.message}" for failure in error.failures]  # without their stacks
        return replace(survey, gang_error=f"in {error.method}: {'; '.join(fates)}")


def _rank_maker(ep_size: int, device: Any) -> Callable[[], "DoctorRank"]:
    def make_rank() -> "DoctorRank":
        from runtime.commands.doctor.cluster.ranks import DoctorRank

        return DoctorRank(ep_size, device)

    return make_rank


def _groups(gang: "Gang", speeds: Sequence["RankSpeed"], ep_size: int) -> tuple[GroupSpeed, ...]:
    return tuple(
        GroupSpeed(
            ranks=tuple(range(first, first + ep_size)),
            nodes=tuple(dict.fromkeys(row.ip for row in gang.rank_map[first : first + ep_size])),
            small_s=speeds[first].small_s,
            bytes_per_s=speeds[first].bytes_per_s,
        )
        for first in range(0, len(speeds), ep_size)
    )
