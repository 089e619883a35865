"""One thing wrong at a time in a survey of a sound cluster: exactly that is found, with a way out."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.commands.doctor.cluster.judge import judge, slow_links, usual
from runtime.commands.doctor.cluster.pairs import rounds
from runtime.commands.doctor.cluster.survey import DRIVER, Clock, GroupSpeed, Link, NodeFacts, Space, Survey
from runtime.commands.doctor.cluster.table import as_text

GIB = 2**30
NODES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
FACTS = NodeFacts(
    host="host",
    versions={"python": "3.11.7", "torch": "2.13.0", "nccl": "2.28.9"},
    sources={"dispatch": "aaaa", "workers": "bbbb"},
    devices=({"name": "H100", "memory_bytes": 80 * GIB},) * 2,
    num_cores=8,
    memory=Space(total=64 * GIB, free=60 * GIB),
    shm=Space(total=GIB, free=GIB),
    disks={"runs": Space(total=100 * GIB, free=50 * GIB)},
)


def survey(nodes=NODES, rate=None, **changes) -> Survey:
    """Sound, but for `changes`; rate: of the link between two nodes, None for 1 GB/s."""
    links = tuple(
        Link(sender=a, receiver=b, latency_s=20e-6, bytes_per_s=rate(a, b) if rate else 1e9)
        for a in nodes
        for b in nodes
        if a != b
    )
    whole = {
        "nodes": dict.fromkeys((DRIVER, *nodes), FACTS),
        "clocks": {node: Clock(offset_s=0.01, error_s=0.001) for node in nodes},
        "links": links,
        "groups": (GroupSpeed(ranks=(0, 1, 2), nodes=nodes, small_s=1e-4, bytes_per_s=1e9),),
        "rank_nodes": nodes,
    }
    return Survey(**whole | changes)


def with_facts(node, **changes) -> Survey:
    sound = survey()
    return replace(sound, nodes={**sound.nodes, node: replace(FACTS, **changes)})


def found(survey):
    return [(finding.severity, finding.subject, finding.problem) for finding in judge(survey)]


def test_a_sound_cluster_has_no_findings_and_neither_has_a_single_machine():
    assert judge(survey()) == []
    assert judge(survey(NODES[:1])) == []
    assert judge(Survey(nodes={DRIVER: FACTS})) == []
    assert as_text(survey(), []).endswith("nothing wrong was found")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"versions": FACTS.versions | {"torch": "2.12.0"}}, "torch is 2.12.0, elsewhere 2.13.0"),
        ({"versions": FACTS.versions | {"nccl": "2.20.1"}}, "nccl is 2.20.1, elsewhere 2.28.9"),
        ({"sources": FACTS.sources | {"workers": "cccc"}}, "Trimtab's source in workers/ is cccc, elsewhere bbbb"),
        ({"sources": {}}, "Trimtab's source in dispatch/ is missing, elsewhere aaaa"),
        ({"shm": Space(total=64 * 2**20, free=64 * 2**20)}, "/dev/shm has 64 MiB free of 64 MiB"),
        ({"shm": Space(total=2**27, free=2**27)}, "/dev/shm has 128 MiB free of 128 MiB"),
        ({"shm": Space(total=GIB, free=2**20)}, "/dev/shm has 1 MiB free of 1.0 GiB"),
        (
            {"disks": {"runs": Space(total=10 * GIB, free=2**29)}},
            "the disk of runs has 512 MiB free and is 95% full",
        ),
        (
            {"disks": {"runs": Space(total=1000 * GIB, free=20 * GIB)}},
            "the disk of runs has 20.0 GiB free and is 98% full",
        ),
        ({"memory": Space(total=64 * GIB, free=2**29)}, "512 MiB of 64.0 GiB of memory are free"),
    ],
)
def test_a_node_that_differs_or_lacks_something_is_named(changes, problem):
    assert ("error", "10.0.0.2", problem) in (findings := found(with_facts("10.0.0.2", **changes)))
    assert {subject for _, subject, _ in findings} == {"10.0.0.2"}


def test_where_two_nodes_differ_the_driver_is_right_and_a_node_without_gpus_has_no_nccl_to_differ():
    two = survey(NODES[:1])
    other = replace(FACTS, versions={"python": "3.12.1", "torch": "2.13.0"})
    assert found(replace(two, nodes={"10.0.0.1": other, DRIVER: FACTS})) == [
        ("error", "10.0.0.1", "python is 3.12.1, elsewhere 3.11.7")
    ]


def test_nodes_of_another_kind_are_a_warning():
    assert found(with_facts("10.0.0.3", devices=FACTS.devices[:1])) == [
        ("warning", "10.0.0.3", "has 1 x H100, other nodes 2 x H100")
    ]


@pytest.mark.parametrize(
    ("offset_s", "error_s", "problem"), [(2.0, 0.1, "ahead"), (-0.7, 0.1, "behind"), (0.7, 0.3, "")]
)
def test_a_clock_is_wrong_when_it_is_off_by_more_than_the_reading_may_be(offset_s, error_s, problem):
    clocks = {"10.0.0.2": Clock(offset_s=offset_s, error_s=error_s)}
    expected = [("error", "10.0.0.2", f"its clock is {abs(offset_s):.2f} s {problem}")] if problem else []
    assert found(survey(clocks=clocks)) == expected


def test_a_slow_pair_is_named_and_marked():
    nodes = (*NODES, "10.0.0.4")
    sick = survey(nodes, rate=lambda a, b: 1e8 if (a, b) == ("10.0.0.1", "10.0.0.3") else 1e9)
    (finding,) = judge(sick)
    assert (finding.subject, finding.problem) == ("10.0.0.1 to 10.0.0.3", "100MB/s, others reach 1.00GB/s")
    assert "only this pair" in finding.advice
    assert as_text(sick, []).count("100MB/s 20 µs*") == 1


def test_many_slow_pairs_without_a_node_in_common_are_one_finding():
    nodes = tuple(f"10.0.0.{number}" for number in range(1, 9))
    slow = {pair: 4e8 + 1e6 * index for index, pair in enumerate(pairwise(nodes))}
    (finding,) = judge(survey(nodes, rate=lambda a, b: slow.get((a, b), 1e9)))
    assert (finding.severity, finding.subject) == ("warning", "7 of 56 links")
    assert finding.problem == "400MB/s (10.0.0.1 to 10.0.0.2) to 406MB/s, others reach 1.00GB/s"


@pytest.mark.parametrize(("rate", "severity"), [(5.1e8, None), (4.9e8, "warning"), (2.4e8, "error")])
def test_half_the_rate_is_a_warning_and_a_quarter_an_error(rate, severity):
    nodes = (*NODES, "10.0.0.4")
    sick = survey(nodes, rate=lambda a, b: rate if (a, b) == ("10.0.0.1", "10.0.0.3") else 1e9)
    assert [finding.severity for finding in judge(sick)] == [severity] * bool(severity)


@pytest.mark.parametrize(
    ("rate", "verbs"),
    [
        (lambda a, b: 1e6 if "10.0.0.2" in (a, b) else 1e9, "sends and receives"),
        (lambda _, b: 1e6 if b == "10.0.0.2" else 1e9, "receives"),
    ],
)
def test_a_node_that_is_slow_with_all_others_is_named_instead_of_its_pairs(rate, verbs):
    assert found(survey(rate=rate)) == [
        ("error", "10.0.0.2", f"{verbs} 1.00MB/s at most, with every other node; others reach 1.00GB/s")
    ]


def test_a_pair_without_connection_and_a_long_way_are_named():
    links = list(survey().links)
    links[0] = Link(sender=NODES[0], receiver=NODES[1], error="TimeoutError: timed out")
    links[5] = replace(links[5], latency_s=0.03)
    assert found(survey(links=tuple(links))) == [
        ("error", "10.0.0.1 to 10.0.0.2", "no connection: TimeoutError: timed out"),
        ("warning", "10.0.0.3 to 10.0.0.2", "latency 30.0 ms, usually below 1.00 ms"),
    ]


def test_nodes_that_do_not_answer_a_group_that_does_not_form_and_a_slow_group_are_named():
    speeds = [1e9, 1e9, 1e9, 1e8]
    groups = tuple(
        GroupSpeed(ranks=(2 * i, 2 * i + 1), nodes=NODES[:2], small_s=1e-4, bytes_per_s=speed)
        for i, speed in enumerate(speeds)
    )
    sick = survey(unreachable={"10.0.0.9": "no answer within 30 s"}, groups=groups, gang_error="rank 1 failed")
    assert found(sick) == [
        ("error", "10.0.0.9", "does not answer: no answer within 30 s"),
        ("error", "process group", "rank 1 failed"),
        (
            "error",
            "expert-parallel group of ranks 6 to 7",
            "all-to-all sends 100MB/s a rank, others 1.00GB/s",
        ),
    ]
    assert "  10.0.0.9         does not answer" in as_text(sick, [])


@pytest.mark.parametrize(("device", "num_found"), [("cpu", 0), ("cuda", 1)])
def test_a_slow_group_inside_a_node_is_told_of_gpus_alone(device, num_found):
    groups = tuple(
        GroupSpeed(ranks=(2 * i, 2 * i + 1), nodes=NODES[:1], small_s=1e-4, bytes_per_s=speed)
        for i, speed in enumerate([1e9, 1e8])
    )
    assert len(found(survey(groups=groups, device=device))) == num_found


def test_beyond_a_dozen_nodes_the_table_holds_those_with_slow_links():
    nodes = tuple(f"10.0.1.{i}" for i in range(20))
    sick = survey(nodes, rate=lambda a, b: 1e8 if (a, b) == (nodes[3], nodes[7]) else 1e9)
    text = as_text(sick, [])
    assert "of 20 nodes 2 have a slow link:" in text
    assert "100MB/s 20 µs*" in text
    assert len(text.splitlines()) < 40


@given(st.integers(0, 33))
def test_every_pair_is_measured_once_and_nobody_twice_in_a_round(count):
    plan = rounds(count)
    assert len(plan) == (0 if count < 2 else count - 1 + count % 2)
    pairs = [pair for pairs in plan for pair in pairs]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for of_round in plan:
        members = [member for pair in of_round for member in pair]
        assert len(members) == len(set(members))


@given(st.integers(3, 20), st.data())
def test_all_links_of_one_bad_node_are_slow_however_many_nodes_there_are(count, data):
    nodes = tuple(map(str, range(count)))
    bad = data.draw(st.sampled_from(nodes))
    links = survey(nodes, rate=lambda a, b: 1e8 if bad in (a, b) else 1e9).links
    assert {(link.sender, link.receiver) for link in slow_links(links)} == {
        (link.sender, link.receiver) for link in links if bad in (link.sender, link.receiver)
    }


def test_the_usual_is_what_three_quarters_do_not_exceed():
    assert usual([4.0, 1.0, 2.0, 3.0]) == 3.0
    assert usual([5.0]) == 5.0
