"""Look at a cluster: a probe on every node, then each pair of nodes, then the ranks of a run to come.

Every wait is bounded, and a node that does not answer once is named and left alone.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from cluster.config import ClusterConfig
from cluster.failures import GangFailed
from cluster.placement import ClusterTooSmall
from runtime.doctor import probe as probe_module
from runtime.doctor.pairs import rounds
from runtime.doctor.probe import Probe
from runtime.doctor.survey import DRIVER, Clock, GroupSpeed, Link, NodeFacts, Survey

if TYPE_CHECKING:
    from cluster.gang import Gang
    from runtime.doctor.ranks import DoctorRank, RankSpeed

ANSWER_S = 30.0  # For a first answer: a Python process, `import torch`, and a node that is busy with that.
CLOCK_S = 5.0
NUM_CLOCKS = 5  # The round trip that took least tells most.
PAIR_S = 6.0
GROUPS_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What to look at. config: of the cluster, with the ranks of the run to come. paths: whose disks matter."""

    config: ClusterConfig
    ep_size: int
    paths: tuple[str, ...]
    say: Callable[[str], None]


@dataclass(frozen=True)
class _Node:
    """A node of the cluster and the probe on it. ip: its address; name: the address, made unique."""

    name: str
    ip: str
    probe: Any


def examine(wanted: Examination) -> Survey:
    """Look at every node of the Ray cluster that this process has joined, and at the ranks that would run there."""
    wanted.say("looking at the nodes")
    token = secrets.token_bytes(16)
    nodes, unreachable = _start_probes(token)
    # The driver's facts are read here meanwhile.
    asked = {node.name: node.probe.facts.remote(wanted.paths) for node in nodes}
    driver = NodeFacts.of(Probe(token).facts(wanted.paths))
    answers, silent = _answers(asked, ANSWER_S)
    unreachable |= silent
    nodes = [node for node in nodes if node.name in answers]
    wanted.say("comparing clocks")
    clocks = {node.name: clock for node in nodes if (clock := _clock(node)) is not None}
    links = _links(nodes, wanted.say)
    for node in nodes:  # their place is for the ranks
        _end(node.probe)
    facts = {DRIVER: driver} | {name: NodeFacts.of(answer) for name, answer in answers.items()}
    survey = Survey(nodes=facts, unreachable=unreachable, clocks=clocks, links=tuple(links))
    wanted.say(f"starting {wanted.config.num_workers} ranks")
    return _with_ranks(survey, wanted)


def _start_probes(token: bytes) -> tuple[list[_Node], dict[str, str]]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(probe_module)
    try:
        probe_class = cast("Any", ray.remote)(Probe)
        nodes: list[_Node] = []
        dead: dict[str, str] = {}
        for number, entry in enumerate(sorted(ray.nodes(), key=lambda entry: str(entry["NodeManagerAddress"]))):
            ip = str(entry["NodeManagerAddress"])
            if not entry["Alive"]:
                dead[ip] = "Ray says that it is dead"
                continue
            name = ip if all(node.name != ip for node in nodes) else f"{ip} ({number})"
            affinity = NodeAffinitySchedulingStrategy(entry["NodeID"], soft=False)
            actor = probe_class.options(num_cpus=0, max_restarts=0, scheduling_strategy=affinity).remote(token)
            nodes.append(_Node(name, ip, actor))
    finally:
        cloudpickle.unregister_pickle_by_value(probe_module)
    # One that was started again is listed as dead too, under its old number.
    alive = {node.ip for node in nodes}
    return nodes, {ip: reason for ip, reason in dead.items() if ip not in alive}


def _answers(asked: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers by name, and why there is none for the others, after limit_s at most."""
    import ray

    if not asked:
        return {}, {}
    calls = list(asked.values())
    done = set(ray.wait(calls, num_returns=len(calls), timeout=limit_s)[0])
    answers, silent = {}, {}
    for name, call in asked.items():
        if call not in done:
            silent[name] = f"no answer within {limit_s:g} s"
            continue
        try:
            answers[name] = ray.get(call)
        except ray.exceptions.RayError as error:
            silent[name] = f"its process died or never ran: {str(error).strip().splitlines()[-1]}"
    return answers, silent


def _clock(node: _Node) -> Clock | None:
    best: Clock | None = None
    for _ in range(NUM_CLOCKS):
        before_s = time.time()
        answers, _ = _answers({node.name: node.probe.now_s.remote()}, CLOCK_S)
        after_s = time.time()
        if not answers:
            return best
        clock = Clock(offset_s=answers[node.name] - (before_s + after_s) / 2, error_s=(after_s - before_s) / 2)
        if best is None or clock.error_s < best.error_s:
            best = clock
    return best


def _links(nodes: Sequence[_Node], say: Callable[[str], None]) -> list[Link]:
    if len(nodes) < 2:
        return []
    ports, silent = _answers({node.name: node.probe.listen.remote(node.ip) for node in nodes}, ANSWER_S)
    lost = dict(silent)
    links: list[Link] = []
    plan = rounds(len(nodes))
    for number, pairs in enumerate(plan, 1):
        say(f"measuring pairs of nodes, round {number} of {len(plan)}")
        of_round = [(nodes[a], nodes[b]) for a, b in pairs if not {nodes[a].name, nodes[b].name} & lost.keys()]
        asked = {a.name: a.probe.measure.remote(b.ip, ports[b.name], PAIR_S) for a, b in of_round}
        answers, silent = _answers(asked, 2 * PAIR_S)
        lost |= silent  # its probe is still busy: it would hold up the rounds to come
        for a, b in of_round:
            links += _both_ways(a.name, b.name, answers.get(a.name, {"error": silent.get(a.name, "")}))
    links += [
        Link(sender=a.name, receiver=b.name, error=f"not measured: {name}: {reason}")
        for name, reason in lost.items()
        for a in nodes
        for b in nodes
        if name == a.name != b.name and not any((link.sender, link.receiver) == (a.name, b.name) for link in links)
    ]
    return links


def _both_ways(a: str, b: str, answer: Mapping[str, Any]) -> list[Link]:
    if "error" in answer:
        return [Link(sender=a, receiver=b, error=answer["error"])]
    latency_s = answer["latency_s"]
    return [
        Link(sender=a, receiver=b, latency_s=latency_s, bytes_per_s=answer["out_bytes_per_s"]),
        Link(sender=b, receiver=a, latency_s=latency_s, bytes_per_s=answer["in_bytes_per_s"]),
    ]


def _end(actor: Any) -> None:
    import ray

    ray.kill(actor)


def _with_ranks(survey: Survey, wanted: Examination) -> Survey:
    from cluster.gang import Gang

    config, ep_size = wanted.config, wanted.ep_size
    try:
        with Gang.launch(config, _rank_maker(ep_size, config.device), ep_size=ep_size) as gang:
            wanted.say(f"exchanging bytes between {gang.world_size} ranks")
            speeds: list[RankSpeed] = gang.run("measure", GROUPS_S, limit_s=config.collective_timeout_s + 2 * GROUPS_S)
            return replace(
                survey,
                groups=_groups(gang, speeds, ep_size) if ep_size > 1 else (),
                rank_nodes=tuple(row.ip for row in gang.rank_map),
                device=speeds[0].device,
                join_s=gang.startup_s["join"],
            )
    except (GangFailed, ClusterTooSmall) as error:
        return replace(survey, gang_error=str(error).strip())


def _rank_maker(ep_size: int, device: Any) -> Callable[[], "DoctorRank"]:
    def make_rank() -> "DoctorRank":
        from runtime.doctor.ranks import DoctorRank

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
