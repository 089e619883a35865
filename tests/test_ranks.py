"""The launcher itself: results by rank, the first failure by name, nobody left behind."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, _failure, _Rank, run_ranks


def _sum_over_ranks(rank: int, world_size: int, offset: int) -> tuple[int, int, int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, int(total), torch.get_num_threads(), torch.full((2,), float(rank), requires_grad=True)


def _rank_2_raises(rank: int, world_size: int) -> None:
    if rank == 2:
        raise ValueError("the wrench")
    dist.all_reduce(torch.zeros(1))  # fails a moment later, because rank 2 is gone: not the cause


def _rank_1_is_killed(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def _rank_1_skips_the_collective(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.zeros(1))
    else:
        _sleep_in_rank_1()


def _sleep_in_rank_1() -> None:
    time.sleep(60)


def _all_but_rank_0_wait(rank: int, world_size: int) -> None:
    if rank > 0:
        threading.Event().wait(60)


def _exits(rank: int, world_size: int) -> None:
    sys.exit(3)


def _rank_processes() -> list[psutil.Process]:
    """Children of the fork server, whose command line is the server's own."""
    server_pids = [p.pid for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [child for pid in server_pids for child in psutil.Process(pid).children()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    results = run_ranks(world_size, _sum_over_ranks, 10)
    expected_sum = sum(range(world_size)) + 10 * world_size
    assert [r[:3] for r in results] == [(rank, expected_sum, 1) for rank in range(world_size)]
    assert [r[3].tolist() for r in results] == [[rank, rank] for rank in range(world_size)]


def test_the_rank_that_failed_first_is_named_with_its_traceback() -> None:
    with pytest.raises(RankFailure, match=r"rank 2 failed first:(?s:.*)in _rank_2_raises(?s:.*)the wrench") as caught:
        run_ranks(3, _rank_2_raises)
    assert caught.value.rank == 2


def test_a_killed_rank_is_the_cause_and_not_the_peers_that_lost_it() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 failed first:\ndied without a report, exit code -9") as caught:
        run_ranks(2, _rank_1_is_killed)
    assert caught.value.rank == 1


def test_a_silent_death_goes_before_reports_that_reached_us_earlier() -> None:
    process, pipe = mock.Mock(), mock.Mock()
    lost_its_peer = _Rank(0, process, pipe, Path("none"), state="failed", error="Connection closed", ended_at=1.0)
    died = _Rank(1, process, pipe, Path("none"), state="died", error="exit code -9", ended_at=1.1)
    assert _failure([lost_its_peer, died], limit_s=60).rank == 1


def test_exit_inside_a_rank_is_a_failure_and_not_a_result() -> None:
    with pytest.raises(RankFailure, match="SystemExit: 3"):
        run_ranks(1, _exits)


def test_a_collective_that_nobody_joins_names_the_missing_rank_and_where_it_is() -> None:
    with pytest.raises(RankFailure, match="rank 0 failed first") as caught:
        run_ranks(2, _rank_1_skips_the_collective, timeout_s=2.0)
    assert caught.value.still_running == [1]
    assert "rank 1 still runs" in str(caught.value)
    assert "in _sleep_in_rank_1" in str(caught.value)


def test_time_limit_names_who_still_runs_and_leaves_no_process() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match="time limit of 1 s passed") as caught:
        run_ranks(3, _all_but_rank_0_wait, timeout_s=1.0)
    assert (caught.value.rank, caught.value.still_running) == (None, [1, 2])
    assert "rank 0 returned" in str(caught.value)
    assert time.monotonic() - started < 30
    assert _rank_processes() == []


def test_a_gang_that_ended_well_leaves_no_process() -> None:
    run_ranks(2, _sum_over_ranks, 0)
    assert _rank_processes() == []
