"""The order of failures: pure, without Ray."""

import pickle

from cluster.failures import GangFailed, WorkerFailure, cause_first


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
