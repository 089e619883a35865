"""The collectives of one step's control, the same on every rank in the same order, whatever a rank finds.

Three small reductions in flight together, on rank 0 one question to the leader, one broadcast of fixed size. What goes
wrong on rank 0 in between travels in the broadcast, so that all ranks end with the same error instead of waiting.

Shapes: N = experts of all MoE layers, M = all counts of the law, the load first, W = world_size.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.balance import bias_checksum
from dispatch.board import Board, Started
from dispatch.collective_errors import CollectiveTimeout
from dispatch.laws import LawState
from workers.actor import COLLATERAL_MARKS
from workers.leader import Event, Leader
from workers.wire import BiasUpdate, Refusal, VersionedState, WireError, decode, encode

_NUM_SLOTS = 4  # what each rank tells of itself: step, version, checksum of the law state, checksum of the live bias


OnBiasMismatch = Literal["stop", "repair"]


class ControlError(RuntimeError):
    """The control path failed: its loop is unusable afterwards and the gang must form again. Survives pickling."""

    def __init__(self, step: int, phase: str, detail: str) -> None:
        super().__init__(step, phase, detail)
        self.step, self.phase, self.detail = step, phase, detail

    def __str__(self) -> str:
        return f"step {self.step}, control phase {self.phase}: {self.detail}"


class ControlTimeout(ControlError):
    """A rank or the coordinator did not come in time."""


class BiasDiverged(ControlError):
    """Ranks disagree on step, law state or live bias: they would send the same token to different experts."""

    def __init__(self, step: int, phase: str, detail: str, ranks: tuple[int, ...]) -> None:
        super().__init__(step, phase, detail)
        self.args = (step, phase, detail, ranks)
        self.ranks = ranks


class NoUpdate(ControlError):
    """Rank 0 could not make the update: a bug in the law or in what it was given. Rank 0's error has the traceback."""

    ranks = (0,)  # whose error comes first in a report on the gang


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundInput:
    """One rank's share of a round. The tensors belong to the round, which reduces them in place.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundResult:
    """What all ranks hold after a round; events on rank 0 only. odd_ranks: their live bias is not that of the base.

    seconds: of this rank, by phase; "coordinator" on rank 0 only, for which the others wait in "broadcast".
    """

    update: BiasUpdate
    odd_ranks: tuple[int, ...]
    counts_M: Tensor
    sums: Tensor
    floats: Tensor
    maxima: Tensor
    stop: bool
    events: list[Event]
    seconds: dict[str, float]


class ControlRound:
    """Makes the rounds of one rank. `phase` says what it is doing, for the error of someone who waits for it.

    Args:
        group: gloo over all ranks; its rank 0 leads. Nobody else may use it during `run`.
        leader: asked on rank 0 only.
        form: a law state with the vectors of this run's law. Their lengths never change.
        on_bias_mismatch: raise where a live bias is not that of the law state, or leave it to the caller to repair.
        board: where the thread that runs the rounds says what it is in.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        leader: Leader,
        form: LawState,
        on_bias_mismatch: OnBiasMismatch,
        board: Board,
    ) -> None:
        self.phase = "idle"
        self._seconds: dict[str, float] = {}
        self._on_bias_mismatch = on_bias_mismatch
        self._group, self._leader, self._board = group, leader, board
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        # Of fixed size, so that no rank has to learn a length first; room enough for the text of an error.
        largest = encode(BiasUpdate(step=(1 << 63) - 1, version=(1 << 63) - 1, state=form))
        self._mail = torch.zeros(8 + max(4096, len(largest)), dtype=torch.uint8)

    def run(self, given: RoundInput) -> RoundResult:
        """Collective: every rank of the group must call it for the same step.

        Raises:
            ControlTimeout: a rank did not come by the deadline. ControlError: a rank is gone.
            BiasDiverged, NoUpdate: on all ranks together.
        """
        self._seconds = {}
        self._board.step = given.step
        if self._board.leaves_out("bias update"):
            return self._without_the_others(given)
        counts, sizes = self._pack(given)
        with self._in_phase(given, "reduce"):
            sums, largest = dist.ReduceOp.SUM, dist.ReduceOp.MAX
            reductions = ((counts, sums), (given.floats, sums), (given.maxima, largest))
            # In flight together: a step pays one latency, not three.
            self._finish([self._start(dist.all_reduce, each, op) for each, op in reductions], given)
        counts_M, slots, totals, stop = torch.split(counts, sizes)
        odd_ranks = self._check_ranks(given, slots.view(self._world_size, _NUM_SLOTS).tolist())
        events, cause = self._lead(given, counts_M) if self._rank == 0 else ([], None)
        with self._in_phase(given, "broadcast"):
            self._finish([self._start(dist.broadcast, self._mail, 0)], given)
        return RoundResult(
            update=self._open_mail(given, cause),
            odd_ranks=odd_ranks,
            counts_M=counts_M,
            sums=totals,
            floats=given.floats,
            maxima=given.maxima,
            stop=bool(stop),
            events=events,
            seconds=self._seconds,
        )

    def _pack(self, given: RoundInput) -> tuple[Tensor, list[int]]:
        slots = torch.zeros(self._world_size, _NUM_SLOTS, dtype=torch.int64)
        slots[self._rank] = torch.tensor([given.step, given.base.version, given.base.checksum, given.live_checksum])
        parts = [given.counts_M, slots.flatten(), given.sums, torch.tensor([int(given.stop_requested)])]
        return torch.cat(parts), [len(part) for part in parts]

    def _check_ranks(self, given: RoundInput, rows: list[list[int]]) -> tuple[int, ...]:
        """The ranks whose live bias is to be repaired; raises where that is not wanted, or not possible."""
        # Every rank sees the same rows, so all raise or none does, and all name the same ranks.
        if odd := tuple(rank for rank, row in enumerate(rows) if row[:3] != rows[0][:3]):
            shown = [f"rank {r} step {rows[r][0]} version {rows[r][1]} state {rows[r][2]:08x}" for r in (0, *odd[:8])]
            raise BiasDiverged(given.step, "verify", f"ranks hold different law states: {', '.join(shown)}", odd)
        expected = bias_checksum(given.base.state.bias_N)
        odd = tuple(rank for rank, row in enumerate(rows) if row[3] != expected)
        if odd and self._on_bias_mismatch == "stop":
            version = f"version {given.base.version} (checksum {expected:08x})"
            detail = f"the live bias of ranks {list(odd)} is not {version}: something else wrote to it"
            raise BiasDiverged(given.step, "verify", detail, odd)
        return odd

    def _lead(self, given: RoundInput, counts_M: Tensor) -> tuple[list[Event], Exception | None]:
        """Put the update, or the reason why there is none, into the mail."""
        events: list[Event] = []
        cause: Exception | None = None
        with self._in_phase(given, "coordinator"):
            try:
                update, events = self._leader.next_update(given.step, given.base, counts_M)
                mail = encode(update)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
                cause = error
                mail = encode(Refusal(reason=f"{type(error).__name__}: {error}"))
        packed = len(mail).to_bytes(8, "little") + mail
        self._mail[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return events, cause

    def _open_mail(self, given: RoundInput, cause: Exception | None) -> BiasUpdate:
        self.phase = "verify"
        raw = self._mail.numpy().tobytes()
        try:
            message = decode(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        except WireError as error:
            raise ControlError(given.step, "verify", f"rank {self._rank} received a bad update: {error}") from error
        if isinstance(message, Refusal):
            raise NoUpdate(given.step, "coordinator", f"rank 0 has no update: {message.reason}") from cause
        expected = (given.step, given.base.version + 1)
        if not isinstance(message, BiasUpdate) or (message.step, message.version) != expected:
            raise ControlError(given.step, "verify", f"rank {self._rank} received another message: {message}")
        return message

    def _without_the_others(self, given: RoundInput) -> RoundResult:
        """What a rank would believe that takes no part; only a fault plan asks for it."""
        return RoundResult(
            update=BiasUpdate(step=given.step, version=given.base.version + 1, state=given.base.state),
            odd_ranks=(),
            counts_M=given.counts_M,
            sums=given.sums,
            floats=given.floats,
            maxima=given.maxima,
            stop=False,
            events=[],
            seconds={},
        )

    def _start(self, collective: Callable[..., Any], value: Tensor, argument: Any) -> Started:
        return self._board.start(collective, value, argument, group=self._group)

    def _finish(self, works: list[Started], given: RoundInput) -> None:
        for work in works:
            # At least a millisecond, because torch reads 0 as "no limit".
            work.wait(timedelta(seconds=max(given.deadline - time.monotonic(), 0.001)))

    @contextmanager
    def _in_phase(self, given: RoundInput, phase: str) -> Iterator[None]:
        self.phase, began = phase, time.perf_counter()
        self._board.enter(f"bias update, {phase}")
        try:
            yield
            self._board.enter("idle")
            self._seconds[phase] = time.perf_counter() - began
        except CollectiveTimeout as error:
            first_line = str(error.__cause__).partition("\n")[0]
            raise ControlTimeout(given.step, phase, f"a rank did not come in time ({first_line})") from error
        except RuntimeError as error:
            if not any(mark in str(error) for mark in COLLATERAL_MARKS):
                raise  # a bug, which must not pass for a lost rank
            first_line = str(error).partition("\n")[0]
            raise ControlError(given.step, phase, f"a rank is gone ({first_line})") from error
