"""Failures and their order: without a running Ray."""

import pickle
from dataclasses import replace
from unittest.mock import MagicMock

import pytest

from cluster.failures.calls import control
from cluster.failures.errors import GangFailed, WorkerFailure, cause_first
from cluster.failures.member import Member
from cluster.gang.placement import ClusterTooSmall
from cluster.gang.supervisor import GaveUp, _details
from cluster.machine.node_state import NodeState
from cluster.machine.processes import Process
from cluster.nodes.node import AlreadyRunning
from cluster.ray.ray_watch import RayDied
from dispatch.diagnosis.collective_errors import CollectiveTimeout, RanksDiverged, WrongSplits
from dispatch.errors import InvalidValue, UserError
from workers.actor import Failure
from workers.checkpoints.checkpoint_files import DiskRefused
from workers.control.errors import ControlTimeout
from workers.distributed.connections import StrangerConnected


def failure(rank: int, kind: str, time_s: float, *, collateral: bool = False) -> WorkerFailure:
    message = f"{kind} {rank}"
    return WorkerFailure(
        rank=rank, ip="10.0.0.1", pid=100 + rank, kind=kind, message=message, time_s=time_s, collateral=collateral
    )


def test_a_death_seen_last_still_comes_before_the_broken_connections_it_caused():
    peer, other = failure(0, "error", 1.0, collateral=True), failure(2, "error", 1.1, collateral=True)
    death = failure(1, "died", 1.2)
    assert cause_first([peer, other, death]) == (death, peer, other)


def test_of_two_errors_of_their_own_the_earlier_one_is_the_cause():
    late, early = failure(0, "error", 2.0), failure(1, "error", 1.0)
    assert cause_first([late, early]) == (early, late)


def test_a_silent_rank_precedes_collateral_errors_and_a_running_one_follows_them():
    collateral, silent = failure(0, "error", 1.0, collateral=True), failure(1, "silent", 0.0)
    running = failure(2, "running", 0.0)
    assert cause_first([collateral, running, silent]) == (silent, collateral, running)


def test_gang_failed_survives_pickling_and_names_rank_node_process_and_method():
    error = pickle.loads(pickle.dumps(GangFailed("train", (failure(1, "died", 1.0), failure(0, "error", 2.0)))))
    assert str(error) == (
        "rank 1 (10.0.0.1, pid 101) failed first, in train: died 1\n  then rank 0 (10.0.0.1, pid 100): error 0"
    )
    assert error.first.rank == 1


def test_of_ranks_that_all_accuse_one_that_one_comes_first():
    error = RanksDiverged(step=3, layer="", phase="dispatch", ranks=(2,), details="")
    failures = [replace(failure(rank, "error", 1.0 + rank), error=error) for rank in range(3)]
    assert [each.rank for each in cause_first(failures)] == [2, 0, 1]


def test_only_an_error_that_no_user_can_mend_is_a_bug_and_shows_its_traceback():
    time_out = CollectiveTimeout(step=1, layer="", phase="gradients", waited_s=1, missing_ranks=None, setting="x")
    diverged = RanksDiverged(step=3, layer="", phase="dispatch", ranks=(2,), details="")
    bugs = [KeyError("k"), diverged, RuntimeError("x"), None]  # None: it did not survive pickling
    no_bugs = [time_out, ControlTimeout(1, "reduce", "late"), InvalidValue("v"), DiskRefused("full"), OSError(5, "io")]
    for error in (*bugs, *no_bugs):
        failed = GangFailed("train", (replace(failure(0, "error", 1.0), error=error, trace="the traceback"),))
        assert (failed.is_bug, GaveUp("why", (failed,)).is_bug) == (error in bugs, error in bugs), repr(error)
        assert ("the traceback" in str(failed)) == (not isinstance(error, UserError)), repr(error)
    stranger = replace(failure(0, "error", 1.0), error=StrangerConnected("10.0.0.9 is none of us"))
    assert not stranger.is_own_error and str(GangFailed("join", (stranger,))) == "10.0.0.9 is none of us"
    for other in ("died", "silent", "hung"):
        assert not GangFailed("train", (failure(0, other, 1.0),)).is_bug
    assert not GangFailed("train", (failure(0, "error", 1.0, collateral=True),)).is_bug
    assert not GaveUp("why", (GangFailed("train", (failure(0, "error", 1.0),)), ClusterTooSmall("no room"))).is_bug
    assert str(GangFailed("train", (replace(failure(0, "error", 1.0), error=DiskRefused("full")),))) == "full"


def test_the_event_of_a_failure_keeps_stacks_and_traceback_within_bounds():
    hung = replace(failure(1, "hung", 0.0), trace="the stack of rank 1")
    other = replace(failure(0, "running", 0.0), trace="x" * 1_000_000)
    told = _details(GangFailed("train", (hung, other)))
    assert told["reason"] == "rank 1 (10.0.0.1, pid 101) failed first, in train: hung 1"
    assert len(told["diagnosis"]) == 32_000
    assert "the stack of rank 1" in _details(GangFailed("train", (hung,)))["diagnosis"]


def test_errors_about_collectives_survive_pickling():
    errors = (
        CollectiveTimeout(
            step=120, layer="layers.7.moe", phase="combine", waited_s=30.04, missing_ranks=[3], setting="the bound"
        ),
        RanksDiverged(step=3, layer="layers.1.moe", phase="dispatch", ranks=[1], details="rank 1 elsewhere"),
        WrongSplits(step=3, layer="", phase="dispatch", rank=1, announced=[0, 1], sent=[0, 2]),
    )
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))
    assert str(errors[0]) == (
        "step 120, combine of layers.7.moe: no end after 30.0 s; missing: rank 3; "
        "if it only needs longer, raise the bound"
    )


def test_the_colours_of_rays_texts_do_not_reach_our_messages():
    from cluster.failures.calls import Member

    message = "creation task, \x1b[36mray::WorkerActor.__init__()\x1b[39m failed"
    assert (
        Member(rank=0, actor=None).failed("died", message).message
        == "creation task, ray::WorkerActor.__init__() failed"
    )


def test_errors_of_ray_and_of_nodes_survive_pickling() -> None:
    died = pickle.loads(pickle.dumps(RayDied("the head is silent", 7.0)))
    assert (str(died), died.since) == ("the head is silent", 7.0)
    node = NodeState(
        address="10.0.0.2",
        gcs_address="10.0.0.1:6379",
        is_head=False,
        dashboard=None,
        token_file=None,
        leader=Process(1, 2),
    )
    running = pickle.loads(pickle.dumps(AlreadyRunning(node, True)))
    assert running.node == node and running.same


def test_a_broken_connection_of_a_quick_call_is_no_error_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Failure.from_error(RuntimeError("Connection closed by peer"))
    monkeypatch.setattr("cluster.failures.calls.ray.get", lambda _call, **_: broken)
    with pytest.raises(GangFailed) as caught:
        control(Member(rank=1, actor=MagicMock()), "progress", timeout_s=1.0)
    assert caught.value.first.collateral and not caught.value.first.is_own_error
