"""Every branch of what to do after a failure, without Ray."""

import pytest

from cluster.failures.errors import GangFailed, Kind, WorkerFailure
from cluster.gang.policy import MAX_BACK_OFF_S, GiveUp, Resize, Restart, Retry, cause_of, decide


def failed(
    kind: Kind, *, method: str = "train", collateral: bool = False, error: Exception | None = None
) -> GangFailed:
    first = WorkerFailure(
        rank=1, ip="10.0.0.2", pid=7, kind=kind, message="m", collateral=collateral, error=error, time_s=1.0
    )
    return GangFailed(method, (first,))


class CollectiveTimeout(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (failed("died"), "lost"),
        (failed("silent"), "lost"),
        (failed("running"), "lost"),
        (failed("error", collateral=True), "lost"),
        (failed("error", error=CollectiveTimeout()), "lost"),
        (failed("error", error=ValueError("bad data")), "own error"),
        (failed("error"), "own error"),  # one that did not survive pickling
        (failed("silent", method="start"), "no room"),
        (failed("running", method="start"), "lost"),  # placed, but slow
        (failed("error", method="start", error=ImportError()), "own error"),
    ],
)
def test_the_cause_follows_from_what_failed_first(failure: GangFailed, cause: str) -> None:
    assert cause_of(failure) == cause


def test_a_rank_on_a_node_that_is_taken_back_was_preempted_whatever_it_said() -> None:
    assert cause_of(failed("died"), {1}) == "preempted"
    assert cause_of(failed("error", error=ValueError()), {1}) == "preempted"
    assert cause_of(failed("died"), {0}) == "lost"


def plan(cause="lost", **changes):
    facts = {"saved_step": 20, "world_size": 4, "capacity": 4, "sizes": (4, 2, 1), "history": (), "max_restarts": 3}
    return decide(cause, **{**facts, **changes})


def lost_at(*steps: int) -> tuple[Restart, ...]:
    return tuple(Restart(cause="lost", saved_step=step) for step in steps)


def test_the_first_loss_is_retried_at_once_at_the_same_size() -> None:
    assert plan() == Retry(back_off_s=0.0)


def test_the_run_s_own_error_is_never_retried() -> None:
    answer = plan("own error")
    assert isinstance(answer, GiveUp) and answer.own_error


def test_tries_without_a_newer_checkpoint_wait_longer_and_end() -> None:
    waits = [plan(history=lost_at(*[20] * tries), max_restarts=5).back_off_s for tries in range(5)]
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert plan(history=lost_at(*[20] * 5), max_restarts=5).reason == (
        "5 restarts without a checkpoint after step 20 (cluster.max_restarts 5)"
    )
    assert "without a first checkpoint" in plan(saved_step=-1, history=lost_at(-1, -1, -1)).reason
    assert plan(history=lost_at(*[20] * 30), max_restarts=99).back_off_s == MAX_BACK_OFF_S


def test_a_newer_checkpoint_makes_the_count_start_anew() -> None:
    assert plan(history=lost_at(0, 10, 10, 10)) == Retry(back_off_s=0.0)
    # One that goes back in time, as after a damaged newest checkpoint, is no progress.
    assert isinstance(plan(saved_step=10, history=lost_at(20, 20, 20)), GiveUp)


def test_no_restart_at_all_can_be_asked_for() -> None:
    assert isinstance(plan(max_restarts=0), GiveUp)


def test_preemptions_neither_count_nor_wait() -> None:
    history = tuple(Restart(cause="preempted", saved_step=20) for _ in range(9))
    assert plan("preempted", history=lost_at(20, 20, 20)) == Resize(world_size=4)
    assert plan(history=history) == Retry(back_off_s=0.0)


def test_the_run_shrinks_to_the_largest_size_that_fits() -> None:
    assert plan(capacity=3) == Resize(world_size=2)
    assert plan(capacity=1, history=lost_at(20)) == Resize(world_size=1, back_off_s=1.0)
    assert plan("preempted", capacity=2) == Resize(world_size=2)


def test_a_fixed_size_waits_for_its_node_or_a_spare() -> None:
    assert plan(capacity=3, sizes=(4,)) == Retry(back_off_s=0.0)


def test_a_replacement_without_a_place_means_fewer_workers_or_the_end() -> None:
    assert plan("no room", capacity=99) == Resize(world_size=2)  # the nodes could hold more, but others use them
    assert plan("no room", world_size=2) == Resize(world_size=1)
    assert plan("no room", world_size=1, capacity=0).reason == "there is room for 0 workers, and the run needs 1"
    assert isinstance(plan("no room", sizes=(4,)), GiveUp)


def test_a_failure_is_not_the_moment_to_grow() -> None:
    assert plan(world_size=2, capacity=4) == Retry(back_off_s=0.0)
