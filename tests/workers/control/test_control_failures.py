"""When a rank, rank 0 or the coordinator fails: an error on every rank, in bounded time, and nobody left waiting."""

import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dispatch.laws import LawState
from runtime.job.coordinator import CoordinatorPolicy
from tests.ranks import run_ranks
from tests.workers.control.control_ranks import (
    NO_FLOATS,
    NO_LOAD,
    NO_SUMS,
    LiveBias,
    load_of,
    one_step,
)
from workers.control.errors import BiasDiverged, ControlError, ControlTimeout, NoUpdate


def _touch_the_bias(rank: int, world_size: int, at: str, odd_rank: int) -> Any:
    model = LiveBias()
    with model.loop(CoordinatorPolicy().handle) as loop:
        one_step(loop, 0, rank)
        if rank == odd_rank and at == "bias":
            model.bias_N[2] += 1e-7
        if rank == odd_rank and at == "law state":
            bias_N = model.bias_N + 1e-7
            model.bias_N.copy_(bias_N)
            loop.restore(1, LawState(bias_N))
        try:
            if at == "apply":
                one_step(loop, 1, rank, apply=rank != odd_rank)
            one_step(loop, 7 if rank == odd_rank and at == "step" else 2, rank)
        except BiasDiverged as error:
            with pytest.raises(BiasDiverged):
                loop.begin_step(3, NO_LOAD, NO_SUMS, NO_FLOATS, NO_SUMS)  # it stays broken
            return error
    return None


@pytest.mark.parametrize("odd_rank", [0, 1])  # rank 0 may be the one that is wrong, too
@pytest.mark.parametrize("at", ["bias", "law state", "apply", "step"])
def test_a_rank_that_diverges_is_named_on_all_ranks(at: str, odd_rank: int) -> None:  # P13
    for error in run_ranks(3, _touch_the_bias, at, odd_rank):
        assert isinstance(error, BiasDiverged)
        assert error.ranks == (odd_rank,) and error.phase == "verify" and error.step in (2, 7)
        assert "rank" in str(error)


def _break_the_law(rank: int, world_size: int) -> Exception | None:
    model = LiveBias()
    with model.loop() as loop:
        one_step(loop, 0, rank)
        if rank == 0:
            loop._round._leader.law = None  # type: ignore[assignment]  # rank 0 alone has a bug
        loop.begin_step(1, load_of(1, rank), NO_SUMS, NO_FLOATS, NO_SUMS)
        before = model.bias_N.clone()
        try:
            loop.finish_step(apply=True)
        except ControlError as error:
            assert model.bias_N.equal(before)
            assert (error.__cause__ is not None) == (rank == 0)
            return type(error)(*error.args)
    return None


def test_what_breaks_on_rank_0_is_raised_on_every_rank() -> None:
    for error in run_ranks(3, _break_the_law):
        assert isinstance(error, NoUpdate) and error.phase == "coordinator"
        assert error.ranks == (0,)  # so that a report on the gang begins with the one that has the cause
        assert "AttributeError" in str(error) and "step 1" in str(error)


def _one_rank_stays_away(rank: int, world_size: int, how: str) -> tuple[Exception | None, float, float]:
    model = LiveBias()

    def stuck(raw: bytes) -> bytes:
        threading.Event().wait()
        return raw

    loop = model.loop(stuck if how == "coordinator" else None, timeout_s=1.0)
    began, failure = time.monotonic(), None
    try:
        if how == "coordinator" or rank != 1:
            one_step(loop, 0, rank)
    except ControlError as error:
        failure = error
    failed = time.monotonic()
    if how == "rank" and rank == 1:
        time.sleep(2.5)  # so that the others time out instead of seeing its connection close
    loop.close(wait_s=0.2)
    closed = time.monotonic()
    return failure, failed - began, closed - failed


def test_a_rank_that_does_not_come_ends_the_wait_of_the_others() -> None:
    by_rank = run_ranks(3, _one_rank_stays_away, "rank")
    for rank in (0, 2):
        error, waited_s, _ = by_rank[rank]
        assert isinstance(error, ControlTimeout) and (error.step, error.phase) == (0, "reduce")
        assert "did not come" in str(error)  # the thread's own error, not the second line of defence
        assert 0.9 < waited_s < 2.5


def test_a_coordinator_that_never_answers_cannot_hang_the_step_or_the_close() -> None:
    for error, waited_s, close_s in run_ranks(2, _one_rank_stays_away, "coordinator"):
        assert isinstance(error, ControlTimeout) and error.phase in ("coordinator", "broadcast")
        assert 0.9 < waited_s < 4.0 and close_s < 2.0


def _meet_a_bug(rank: int, world_size: int) -> tuple[str, list[str]]:
    def buggy(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    loop = LiveBias().loop()
    loop._round._finish = buggy  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        one_step(loop, 0, rank)
    loop.close(wait_s=1.0)
    return type(caught.value).__name__, [entry.name for entry in caught.traceback]


def test_a_bug_in_a_round_does_not_pass_for_a_lost_rank() -> None:
    [(name, frames)] = run_ranks(1, _meet_a_bug)
    assert name == "RuntimeError" and "buggy" in frames


@pytest.mark.parametrize("error", [ControlError(3, "reduce", "x"), ControlTimeout(3, "reduce", "x"),
                                   BiasDiverged(3, "verify", "x", (1, 2))])  # fmt: skip
def test_the_errors_survive_pickling(error: ControlError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) == f"step 3, control phase {error.phase}: x"
    assert getattr(copy, "ranks", None) == getattr(error, "ranks", None)


def test_an_unclosed_loop_does_not_keep_the_interpreter_from_ending(tmp_path: Path) -> None:
    script = f"""
import torch, torch.distributed as dist
from tests.workers.control.control_ranks import LiveBias, one_step
dist.init_process_group("gloo", store=dist.FileStore({str(tmp_path / "store")!r}, 1), rank=0, world_size=1)
loop = LiveBias().loop()
one_step(loop, 0, 0)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
