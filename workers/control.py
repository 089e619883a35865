"""The control path of one rank: small sums, the next bias and a stop flag, hidden behind backward and optimizer.

A thread of each rank makes one round (see workers.control_round) between the last forward of a step and the end of its
optimizer step. The training thread only hands over its counts and takes the result.

Shapes: N = experts of all MoE layers, M = all counts of the law (see dispatch.laws.Law), the load first.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.balance import bias_checksum
from dispatch.board import Board
from dispatch.errors import InvalidValue
from dispatch.laws import Law, LawState
from workers.control_round import (
    BiasDiverged,
    ControlError,
    ControlRound,
    ControlTimeout,
    OnBiasMismatch,
    RoundInput,
    RoundResult,
)
from workers.leader import Event, Leader
from workers.wire import VersionedState, same_form

__all__ = ["BiasDiverged", "ControlError", "ControlLoop", "ControlTimeout", "StepControl"]

_GRACE_S = 1.0  # how much later than the thread, which knows the cause, the training thread gives up


@dataclass(frozen=True, kw_only=True, eq=False)
class StepControl:
    """What the control of a step brought: equal on all ranks but for the seconds and the events.

    counts_M, sums, floats, maxima: over all ranks. load_N: the first N of counts_M. stop: some rank asked to stop.
    bias_N, bias_version, bias_checksum: what routed this step. wait_s: finish_step waited. bias_update_s: the training
    thread prepared the round and wrote the bias. round_s: what the control thread did, by phase. events: of the
    coordinator, on rank 0 only.
    """

    step: int
    counts_M: Tensor
    sums: Tensor
    floats: Tensor
    maxima: Tensor
    stop: bool
    bias_N: Tensor
    bias_version: int
    bias_checksum: int
    wait_s: float
    bias_update_s: float
    round_s: Mapping[str, float]
    events: tuple[Event, ...]

    @property
    def load_N(self) -> Tensor:  # noqa: N802 - the shape is part of the name
        """Tokens per expert over all ranks, int64."""
        return self.counts_M[: len(self.bias_N)]

    @property
    def statistic(self) -> Tensor:
        """What the law counted beside the load, over all ranks, int64 (M - N,)."""
        return self.counts_M[len(self.bias_N) :]


class ControlLoop:
    """Runs the control path. Between begin_step and finish_step its thread is the only user of `group`.

    Args:
        group: gloo over all ranks; its rank 0 leads.
        read_bias: a copy of this rank's live bias, fp32 (N,) on the CPU.
        write_state: sets what the routers need of a law state, in place.
        coordinator: for rank 0, see Leader; None applies the law there. Other ranks do not use it.
        timeout_s: for the round of one step, from begin_step on; more than twice the coordinator's own time-out.
        on_bias_mismatch: where a rank's live bias is not that of the law state it routed a step: "stop" raises on all
            ranks; "repair" sets it again. Ranks whose law states differ stop in either case.
        board: where the thread says what it is in; one of its own if not given.

    The first law state is the initial one, with the bias that the model has now: zero in a fresh model.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup,
        law: Law,
        run_id: str,
        read_bias: Callable[[], Tensor],
        write_state: Callable[[LawState], None],
        coordinator: Callable[[bytes], bytes] | None = None,
        timeout_s: float = 30.0,
        on_bias_mismatch: OnBiasMismatch = "stop",
        board: Board | None = None,
    ) -> None:
        self._read_bias, self._write_state, self._timeout_s = read_bias, write_state, timeout_s
        self._law, self._form = law, law.initial_state()
        self._base = VersionedState(0, LawState(read_bias(), self._form.extras))
        self._check_form(self._base.state)
        write_state(self._base.state)
        leader = Leader(run_id=run_id, law=law, coordinator=coordinator)
        self._round = ControlRound(group, leader, self._form, on_bias_mismatch, board or Board())
        self._leads = dist.get_rank(group) == 0
        self._pending: RoundInput | None = None
        self._begin_s = 0.0
        self._error: Exception | None = None
        self._inputs: queue.SimpleQueue[RoundInput | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[RoundResult | Exception] = queue.SimpleQueue()
        # daemon: a thread stuck in a collective must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def begin_step(
        self,
        step: int,
        counts_M: Tensor,
        sums: Tensor,
        floats: Tensor,
        maxima: Tensor,
        stop_requested: bool = False,
    ) -> None:
        """Start the control of a step, right after its last forward. Does not wait for other ranks.

        Args:
            step: at least 0.
            counts_M: of this rank, int64 (M,) on the CPU.
            sums, floats, maxima: int64, float64, int64, on the CPU, of any length that is the same on all ranks; for
                the sum, the sum and the largest over all ranks.

        Collective: every rank must call it with the same step. The tensors are copied, never modified. Reads the live
        bias, which waits for the device.
        """
        began = time.perf_counter()
        self._check_usable()
        if self._pending is not None:
            raise RuntimeError(f"begin_step({step}) before finish_step of step {self._pending.step}")
        self._pending = RoundInput(
            step=step,
            base=self._base,
            live_checksum=bias_checksum(self._read_bias()),
            counts_M=_copy("counts_M", counts_M, torch.int64, self._law.num_counts),
            sums=_copy("sums", sums, torch.int64),
            floats=_copy("floats", floats, torch.float64),
            maxima=_copy("maxima", maxima, torch.int64),
            stop_requested=stop_requested,
            deadline=time.monotonic() + self._timeout_s,
        )
        self._inputs.put(self._pending)
        self._begin_s = time.perf_counter() - began

    def finish_step(self, apply: bool) -> StepControl:
        """Wait for the control of the step; after the optimizer step, before the next forward.

        apply: set the new bias. False where the optimizer skipped the step: then its load moves nothing (B37). Nor does
            the load of a step that a rank routed by another bias: the bias of the step before is set again.

        Raises:
            ControlTimeout, BiasDiverged, ControlError: on every rank that still takes part, within `timeout_s` of
                begin_step. Every later call raises the same error.

        Collective: every rank must call it with the same `apply`.
        """
        began = time.perf_counter()
        self._check_usable()
        if self._pending is None:
            raise RuntimeError("finish_step without begin_step")
        given, used = self._pending, self._base
        result = self._wait_for(given)
        arrived = time.perf_counter()
        self._pending = None
        if result.odd_ranks:
            self._write_state(used.state)  # on all ranks: on the others it changes nothing
        elif apply:
            self._write_state(result.update.state)
            self._base = VersionedState(result.update.version, result.update.state)
        return StepControl(
            step=given.step,
            counts_M=result.counts_M,
            sums=result.sums,
            floats=result.floats,
            maxima=result.maxima,
            stop=result.stop,
            bias_N=used.state.bias_N.clone(),
            bias_version=used.version,
            bias_checksum=given.live_checksum,
            wait_s=arrived - began,
            bias_update_s=self._begin_s + time.perf_counter() - arrived,
            round_s=result.seconds,
            events=(*result.events, *self._repair_event(given.step, result.odd_ranks)),
        )

    def state(self) -> tuple[int, LawState]:
        """A copy of version and law state in force, for a checkpoint."""
        return self._base.version, _copy_state(self._base.state)

    def restore(self, version: int, state: LawState) -> None:
        """Go on from a checkpoint's law state, between steps, after the model has been loaded.

        Raises:
            ValueError: the state belongs to another law or layout, or its bias is not the one that the model has.
        """
        self._check_form(state)
        live, saved = bias_checksum(self._read_bias()), bias_checksum(state.bias_N)
        if live != saved:
            raise ValueError(
                f"the model's bias (checksum {live:08x}) is not that of the law state to restore ({saved:08x}); "
                "load both from one checkpoint, the model first"
            )
        self._base = VersionedState(version, _copy_state(state))
        self._write_state(self._base.state)

    def close(self, wait_s: float = 5.0) -> None:
        """End the thread; waits at most `wait_s`, also after an error. Repeating it is harmless."""
        self._inputs.put(None)
        self._thread.join(wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while (given := self._inputs.get()) is not None:
            try:
                self._outcomes.put(self._round.run(given))
            except Exception as error:  # noqa: BLE001 - the end of the thread: finish_step raises it on the other side
                self._outcomes.put(error)

    def _wait_for(self, given: RoundInput) -> RoundResult:
        outcome: RoundResult | Exception
        try:
            outcome = self._outcomes.get(timeout=max(given.deadline - time.monotonic(), 0.0) + _GRACE_S)
        except queue.Empty:
            outcome = ControlTimeout(given.step, self._round.phase, f"no end within {self._timeout_s} s")
        if isinstance(outcome, RoundResult):
            return outcome
        self._error = outcome
        raise outcome

    def _repair_event(self, step: int, odd_ranks: tuple[int, ...]) -> list[Event]:
        if not odd_ranks or not self._leads:
            return []
        return [{"event": "bias_repaired", "step": step, "ranks": list(odd_ranks)}]

    def _check_usable(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise RuntimeError("the control loop is closed")

    def _check_form(self, state: LawState) -> None:
        if not same_form(state, self._form):
            raise InvalidValue(
                f"a law state with {len(state.bias_N)} biases and {sorted(state.extras)} does not fit this run's law, "
                f"which has {len(self._form.bias_N)} and {sorted(self._form.extras)}; keep the balance and model "
                "settings of the run that saved it"
            )
        if not bool(state.bias_N.isfinite().all()):
            raise ValueError("the bias is not finite; initialise or load the model before the control loop")


def _copy(name: str, value: Tensor, dtype: torch.dtype, length: int | None = None) -> Tensor:
    # A copy, because the round reduces in place and the caller goes on to read or reset its own (B7).
    if value.dtype != dtype or value.device.type != "cpu" or value.dim() != 1 or length not in (None, len(value)):
        got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
        raise ValueError(f"{name} is {got}; it must be {dtype}, on the CPU, of shape ({length or 'any length'},)")
    return value.clone()


def _copy_state(state: LawState) -> LawState:
    return LawState(state.bias_N.clone(), {name: value.clone() for name, value in state.extras.items()})
