"""The control path of one rank: from its counts of a step to the next bias, beside backward and optimizer.

A thread of each rank makes one round (`ControlRound`) between the last forward of a step and the end of its optimizer
step. The training thread only hands over its counts and takes the result. See `workers.control` for why.

Shapes: N experts of all MoE layers, M counts of the law (see dispatch.laws.Law), the load first, W = world_size.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.balance import bias_checksum
from dispatch.diagnosis.activity_tracker import ActivityTracker, PendingCollective
from dispatch.diagnosis.collective_errors import CollectiveTimeout
from dispatch.laws import Law, LawState
from workers.control.errors import BiasDiverged, ControlError, ControlTimeout, NoUpdate, different_states
from workers.control.leader import Event, Leader
from workers.control.wire import (
    BiasUpdate,
    Refusal,
    VersionedState,
    WireError,
    mail_bytes,
    read_mail,
    time_until,
    tree_all_reduce,
    write_mail,
)
from workers.distributed.collateral import is_collateral

_NUM_SLOTS = 4  # numbers that ranks compare: step, version, checksum of the law state, checksum of the live bias
# The control thread's own time-out error names the cause, so the training thread waits this much longer for it.
_GRACE_S = 1.0

OnBiasMismatch = Literal["stop", "repair"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepControl:
    """The result of a step's control path: equal on all ranks but for the seconds and the events.

    counts_M, sums, floats, maxima: what the ranks gave `begin_step`, reduced over all of them. stop: some rank asked to
    stop. bias_N, bias_version, bias_checksum: the bias that routed this step. odd_ranks: ranks that routed it by
    another bias, and were repaired. wait_s: how long finish_step waited. bias_update_s: seconds of the training thread,
    to prepare the round and to write the bias. round_s: seconds of the control thread, by phase; "coordinator" is on
    rank 0 only, while the others wait in "broadcast". events: about the coordinator and repairs, on rank 0 only.
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
    odd_ranks: tuple[int, ...]
    round_s: Mapping[str, float]
    events: tuple[Event, ...]
    wait_s: float = 0.0
    bias_update_s: float = 0.0

    @property
    def load_N(self) -> Tensor:  # noqa: N802 - the shape is part of the name
        """Tokens per expert over all ranks, int64: the first N of counts_M."""
        return self.counts_M[: len(self.bias_N)]

    @property
    def statistic(self) -> Tensor:
        """What the law counted beside the load, over all ranks, int64 (M - N,)."""
        return self.counts_M[len(self.bias_N) :]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundInput:
    """One rank's input to a round, which reduces its tensors in place: afterwards they are sums over all ranks.

    base: the law state that routed the step. live_checksum: of the bias in the model. deadline: time.monotonic().
    """

    step: int
    base: VersionedState
    live_checksum: int
    counts_M: Tensor
    sums: Tensor
    floats: Tensor
    maxima: Tensor
    stop_requested: bool
    deadline: float


_Outcome = tuple[BiasUpdate, StepControl]


class ControlLoop:
    """Runs the control path. Between begin_step and finish_step its thread is the only user of `group`.

    Args:
        group: gloo over all ranks; its rank 0 leads.
        read_bias: a copy of this rank's live bias, fp32 (N,) on the CPU.
        write_state: copies a law state, or what the routers need of it, into the routers in place.
        coordinator: for rank 0, see Leader; None applies the law there. Other ranks do not use it.
        timeout_s: for the round of one step, from begin_step on; more than twice the time-out of a call to the
            coordinator, which may be called twice in a step.
        on_bias_mismatch: what happens where the bias in a rank's model is not that of its law state: "stop" raises on
            all ranks; "repair" writes it again. Ranks whose law states differ stop in either case.
        tracker: where the control thread notes its phase and its collectives; a new one if not given.

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
        tracker: ActivityTracker | None = None,
    ) -> None:
        self._law, self._read_bias, self._write_state, self._timeout_s = law, read_bias, write_state, timeout_s
        self._base = VersionedState(0, LawState(read_bias(), law.initial_state().extras))
        self._law.check_state(self._base.state)
        write_state(self._base.state)
        leader = Leader(run_id=run_id, law=law, coordinator=coordinator)
        self._round = ControlRound(group, leader, on_bias_mismatch, tracker or ActivityTracker())
        self._pending: RoundInput | None = None
        self._begin_s = 0.0
        self._error: Exception | None = None
        self._inputs: queue.SimpleQueue[RoundInput | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_Outcome | Exception] = queue.SimpleQueue()
        # daemon: a thread stuck in a collective must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def begin_step(
        self, step: int, counts_M: Tensor, sums: Tensor, floats: Tensor, maxima: Tensor, stop_requested: bool = False
    ) -> None:
        """Start the control of a step, right after its last forward. Does not wait for other ranks.

        Args:
            step: at least 0.
            counts_M: of this rank, int64 (M,) on the CPU.
            sums: int64, to be summed over all ranks.
            floats: float64, to be summed over all ranks.
            maxima: int64, of which the largest over all ranks is taken, element by element.

        All tensors have one dimension, lie on the CPU and have the same length on all ranks. They are copied, never
        modified. Reads the live bias, which waits for the device.

        Collective: every rank must call it with the same step.
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

        apply: set the new bias. False where the optimizer skipped the step: a bias must not move without the weights
            that caused the load. Where `odd_ranks` is not empty the new bias is not set either, since the load comes
            from two different biases: all ranks write the bias of the step again.

        Raises:
            ControlTimeout, BiasDiverged, ControlError: on every rank that still takes part, within `timeout_s` of
                begin_step. Every later call raises the same error.

        Collective: every rank must call it with the same `apply`.
        """
        began = time.perf_counter()
        self._check_usable()
        if self._pending is None:
            raise RuntimeError("finish_step without begin_step")
        update, control = self._wait_for(self._pending)
        arrived = time.perf_counter()
        self._pending = None
        if control.odd_ranks:
            self._write_state(self._base.state)  # on all ranks: on the others it changes nothing
        elif apply:
            self._write_state(update.state)
            self._base = VersionedState(update.version, update.state)
        return replace(control, wait_s=arrived - began, bias_update_s=self._begin_s + time.perf_counter() - arrived)

    def state(self) -> tuple[int, LawState]:
        """Return a copy of the version and law state in force, for a checkpoint."""
        return self._base.version, self._base.state.copy()

    def restore(self, version: int, state: LawState) -> None:
        """Go on from a checkpoint's law state, between steps, after the model has been loaded.

        Raises:
            ValueError: the state belongs to another law or layout, or its bias is not the one that the model has.
        """
        self._law.check_state(state)
        live, saved = bias_checksum(self._read_bias()), bias_checksum(state.bias_N)
        if live != saved:
            raise ValueError(
                f"the model's bias (checksum {live:08x}) is not that of the law state to restore ({saved:08x}); "
                "load both from one checkpoint, the model first"
            )
        self._base = VersionedState(version, state.copy())
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

    def _wait_for(self, given: RoundInput) -> _Outcome:
        outcome: _Outcome | Exception
        try:
            outcome = self._outcomes.get(timeout=max(given.deadline - time.monotonic(), 0.0) + _GRACE_S)
        except queue.Empty:
            outcome = ControlTimeout(given.step, self._round.phase, f"no end within {self._timeout_s} s")
        if isinstance(outcome, Exception):
            self._error = outcome
            raise outcome
        return outcome

    def _check_usable(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise RuntimeError("the control loop is closed")


def _copy(name: str, value: Tensor, dtype: torch.dtype, length: int | None = None) -> Tensor:
    # A copy, because the round reduces in place while the caller goes on to read its own tensor, or to zero it.
    if value.dtype != dtype or value.device.type != "cpu" or value.dim() != 1 or length not in (None, len(value)):
        got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
        raise ValueError(f"{name} is {got}; it must be {dtype}, on the CPU, of shape ({length or 'any length'},)")
    return value.clone()


class ControlRound:
    """This rank's part of one step's control collectives: the same on every rank, in the same order, whatever fails.

    One small reduction along a tree, on rank 0 one question to the leader, one broadcast of fixed size. An error on
    rank 0 in between travels in the broadcast, so that all ranks end with the same error instead of waiting. `phase`
    is what the round is doing now, for the error of a thread that waits for it. See ControlLoop for the arguments.
    """

    def __init__(
        self, group: dist.ProcessGroup, leader: Leader, on_bias_mismatch: OnBiasMismatch, tracker: ActivityTracker
    ) -> None:
        self.phase = "idle"
        self._seconds: dict[str, float] = {}
        self._on_bias_mismatch = on_bias_mismatch
        self._group, self._leader, self._tracker = group, leader, tracker
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._mail = torch.zeros(mail_bytes(leader.law), dtype=torch.uint8)

    def run(self, given: RoundInput) -> _Outcome:
        """Return the next state, and what finish_step returns. Collective: every rank must call it for the same step.

        Raises:
            ControlTimeout: a rank did not come by the deadline. ControlError: a rank is gone.
            BiasDiverged, NoUpdate: on all ranks together.
        """
        self._seconds = {}
        self._tracker.step = given.step
        ints, sizes = self._pack(given)
        with self._in_phase(given, "reduce"):
            reduction = self._tracker.start(tree_all_reduce, (ints, given.floats), given.maxima, group=self._group)
            self._finish(reduction, given)
        counts_M, slots, sums, stop = torch.split(ints, sizes)
        odd_ranks = self._check_ranks(given, slots.view(self._world_size, _NUM_SLOTS).tolist())
        events, cause = self._lead(given, counts_M, odd_ranks) if self._rank == 0 else ([], None)
        with self._in_phase(given, "broadcast"):
            self._finish(self._tracker.start(dist.broadcast, self._mail, 0, group=self._group), given)
        update = self._open_mail(given, cause)
        return update, StepControl(
            step=given.step,
            counts_M=counts_M,
            sums=sums,
            floats=given.floats,
            maxima=given.maxima,
            stop=bool(stop),
            bias_N=given.base.state.bias_N.clone(),
            bias_version=given.base.version,
            bias_checksum=given.live_checksum,
            odd_ranks=odd_ranks,
            round_s=self._seconds,
            events=tuple(events),
        )

    def _pack(self, given: RoundInput) -> tuple[Tensor, list[int]]:
        """Concatenate all integers to be summed; returns them and the length of each part.

        The slots are a table with a row for each rank. A rank fills its own row and leaves zeros in the others, so that
        the sum over ranks is an all-gather of the rows.
        """
        slots = torch.zeros(self._world_size, _NUM_SLOTS, dtype=torch.int64)
        slots[self._rank] = torch.tensor([given.step, given.base.version, given.base.checksum, given.live_checksum])
        parts = [given.counts_M, slots.flatten(), given.sums, torch.tensor([int(given.stop_requested)])]
        return torch.cat(parts), [len(part) for part in parts]

    def _check_ranks(self, given: RoundInput, rows: list[list[int]]) -> tuple[int, ...]:
        """Return the ranks whose live bias must be repaired; raise where repairing is not wanted or possible."""
        # Every rank sees the same rows, so all raise or none does, and all name the same ranks.
        if any(row[:3] != rows[0][:3] for row in rows):
            raise different_states(given.step, [tuple(row[:3]) for row in rows])
        expected = bias_checksum(given.base.state.bias_N)
        odd = tuple(rank for rank, row in enumerate(rows) if row[3] != expected)
        if odd and self._on_bias_mismatch == "stop":
            version = f"version {given.base.version} (checksum {expected:08x})"
            detail = f"the live bias of ranks {list(odd)} is not {version}: something else wrote to it"
            raise BiasDiverged(given.step, "verify", detail, odd)
        return odd

    def _lead(
        self, given: RoundInput, counts_M: Tensor, odd_ranks: tuple[int, ...]
    ) -> tuple[list[Event], Exception | None]:
        """On rank 0: put the update, or the reason why there is none, into the buffer that is broadcast next."""
        events: list[Event] = []
        cause: Exception | None = None
        with self._in_phase(given, "coordinator"):
            try:
                update, events = self._leader.next_update(given.step, given.base, counts_M)
                write_mail(self._mail, update)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
                cause = error
                write_mail(self._mail, Refusal(reason=f"{type(error).__name__}: {error}"))
        if odd_ranks:
            events = [*events, {"event": "bias_repaired", "step": given.step, "ranks": list(odd_ranks)}]
        return events, cause

    def _open_mail(self, given: RoundInput, cause: Exception | None) -> BiasUpdate:
        self.phase = "verify"
        try:
            message = read_mail(self._mail)
        except WireError as error:
            raise ControlError(given.step, "verify", f"rank {self._rank} received a bad update: {error}") from error
        if isinstance(message, Refusal):
            raise NoUpdate(given.step, "coordinator", f"rank 0 has no update: {message.reason}") from cause
        expected = (given.step, given.base.version + 1)
        if not isinstance(message, BiasUpdate) or (message.step, message.version) != expected:
            raise ControlError(given.step, "verify", f"rank {self._rank} received another message: {message!s:.300}")
        return message

    def _finish(self, collective: PendingCollective, given: RoundInput) -> None:
        collective.wait(time_until(given.deadline))

    @contextmanager
    def _in_phase(self, given: RoundInput, phase: str) -> Iterator[None]:
        self.phase, began = phase, time.perf_counter()
        self._tracker.set_phase(f"bias update, {phase}")
        try:
            yield
            # Not after an error: the driver reads the phase that failed.
            self._tracker.set_phase("idle")
            self._seconds[phase] = time.perf_counter() - began
        except CollectiveTimeout as error:
            first_line = str(error.__cause__).partition("\n")[0]
            raise ControlTimeout(given.step, phase, f"a rank did not come in time ({first_line})") from error
        except RuntimeError as error:
            if not is_collateral(str(error)):
                raise  # a bug, which must not pass for a lost rank
            first_line = str(error).partition("\n")[0]
            raise ControlError(given.step, phase, f"a rank is gone ({first_line})") from error
