"""Where a rank writes what it is in, while it works, to be read from another thread.

A rank that hangs cannot say so. Each therefore keeps a `Board` of its place and of the collectives it has started; what
watches the ranks compares the boards. Written by one thread, without a lock: a few attributes a phase.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from dispatch.activity import MOE_PHASES, Activity, Collective, Splits
from dispatch.collective_errors import CollectiveTimeout, RanksDiverged, WrongSplits, place_text, ranks_text

_IN_BACKWARD = {phase: f"backward {phase}" for phase in MOE_PHASES}
_WITH_LAYER = frozenset([*MOE_PHASES, *_IN_BACKWARD.values()])
_LAYERS = 1 << 20  # more than any model has
# What gloo and NCCL say. "Application timeout" is of an exchange whose pair of ranks ran out of time in another one.
_TIMED_OUT = ("timed out", "Timed out", "timeout")
_HISTORY = 24  # collectives; a layer has about eight


def in_backward() -> bool:
    """True inside an autograd backward pass: in a forward, that means activation recompute."""
    # The same test that torch.utils.checkpoint makes for its own bookkeeping.
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001 - no public name


class Trigger(Protocol):
    """What a fault plan hooks into a board, for tests; see workers.faults."""

    def act(self, board: Board) -> None:
        """Called at every entry of a phase."""
        ...

    def wants(self, action: Literal["skip", "lie"], phase: str, board: Board) -> int:
        """Asked where a rank could leave out something or lie; 0 for no, else the fault's amount."""
        ...


@dataclass(eq=False, slots=True)
class Started:
    """A collective under way on a board."""

    board: Board
    op: str
    group: str
    index: int
    members: tuple[int, ...]
    step: int
    layer: str
    phase: str
    began: float
    splits: Splits | None
    work: Any = None
    failed: float = 0.0
    waited_for: bool = False
    ended: bool = False

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait for the backend: on CUDA the current stream does, not the host.

        Raises:
            CollectiveTimeout: the backend gave up; this rank's view, which does not know who is missing.
        """
        try:
            if timeout is None:
                self.work.wait()
            else:
                self.work.wait(timeout)
        except RuntimeError as error:
            raise self._explained(error) from error
        self.waited_for = True
        self.board.close_ended()

    @property
    def is_open(self) -> bool:
        """Whether it has not ended, or ended in an error: then it stays, as this rank's last word."""
        return not self.ended and (self.work is None or bool(self.failed) or not self.work.is_completed())

    def read(self, now: float) -> Collective:
        """A copy for another process."""
        return Collective(
            op=self.op,
            group=self.group,
            index=self.index,
            members=self.members,
            step=self.step,
            layer=self.layer,
            phase=self.phase,
            waited_s=(self.failed or now) - self.began,
            splits=self.splits,
        )

    def _explained(self, error: RuntimeError) -> RuntimeError:
        self.failed = time.monotonic()
        if not any(text in str(error) for text in _TIMED_OUT):
            error.add_note(f"in {place_text(self.step, self.phase, self.layer)} ({self.op})")
            return error
        return CollectiveTimeout(
            step=self.step,
            layer=self.layer,
            phase=self.phase,
            waited_s=self.failed - self.began,
            missing_ranks=None,
            setting="the time-out of its process group",
        )


@dataclass(eq=False)
class Board:
    """The place of one thread of a rank and its collectives under way; every collective of a step is started by it.

    layers: the names of the model's MoE layers, in order (`dispatch.layer.name_layers`). trigger: a fault plan.
    """

    trigger: Trigger | None = None
    layers: tuple[str, ...] = ()
    step: int = 0
    layer: str = ""
    phase: str = "idle"
    since: float = field(default_factory=time.monotonic)
    _started: dict[str, int] = field(default_factory=dict)
    _open: list[Started] = field(default_factory=list)
    _recent: deque[tuple[str, int, int, str, str]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    # By name, since a board that held the groups would keep them, and their store, from ending with the gang.
    _members: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def enter(self, phase: str) -> None:
        """Say what this thread does from now on."""
        self.phase = _IN_BACKWARD[phase] if phase in _IN_BACKWARD and in_backward() else phase
        self.since = time.monotonic()
        if self.trigger is not None:
            self.trigger.act(self)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Enter a phase and go back to the one before. An exception leaves the board as it is: the last word."""
        before = self.phase
        self.enter(phase)
        yield
        self.phase, self.since = before, time.monotonic()

    @property
    def shown_layer(self) -> str:
        """The layer, in the phases that belong to one."""
        return self.layer if self.phase in _WITH_LAYER else ""

    def leaves_out(self, phase: str) -> bool:
        """Whether a fault plan makes this rank leave out what comes now."""
        return self.trigger is not None and bool(self.trigger.wants("skip", phase, self))

    def told_to_send(self, announced: list[int]) -> list[int]:
        """The rows that an exchange hands over: those announced, unless a fault plan makes this rank lie."""
        amount = 0 if self.trigger is None else self.trigger.wants("lie", self.phase, self)
        if not amount:
            return announced
        other = 1 if announced[0] == 0 else 0  # any rank but this one, whose own place is 0
        return [max(0, rows + amount) if rank == other else rows for rank, rows in enumerate(announced)]

    def start(
        self,
        op: Callable[..., Any],
        *args: Any,
        group: dist.ProcessGroup,
        splits: Splits | None = None,
    ) -> Started:
        """Start a collective of torch.distributed, which must be waited for.

        Raises:
            WrongSplits: they are not what this rank announced.
        """
        self.close_ended()
        started = self._note(op.__name__, group, splits)
        if splits is not None and splits.sent != splits.announced:
            raise WrongSplits(
                step=self.step,
                layer=self.shown_layer,
                phase=self.phase,
                rank=dist.get_rank(),
                announced=splits.announced,
                sent=splits.sent,
            )
        started.work = op(*args, group=group, async_op=True)
        return started

    def run(self, op: Callable[..., Any], *args: Any, group: dist.ProcessGroup) -> None:
        """Start a collective and wait for it."""
        self.start(op, *args, group=group).wait()

    @property
    def place_number(self) -> int:
        """Step and MoE layer as one int64, the same on all ranks that are in the same place."""
        return self.step * _LAYERS + (self.layers.index(self.layer) + 1 if self.layer in self.layers else 0)

    def check_met(self, places: list[int], groups: list[dist.ProcessGroup]) -> None:
        """Raise RanksDiverged unless all ranks of the groups, whose places these are, are where this one is."""
        mine = self.place_number
        if all(place == mine for place in places):
            return
        ranks = [rank for group in groups for rank in dist.get_process_group_ranks(group)]
        raise self._diverged(dict(zip(ranks, places, strict=True)))

    def _diverged(self, place_of: dict[int, int]) -> RanksDiverged:
        counts = Counter(place_of.values()).most_common()
        # Without a majority those behind are taken to be right: a rank that leaves something out is ahead.
        usual = min(place for place, count in counts if count == counts[0][1])
        text_of = {place: self._text_of(place) for place, _ in counts}
        where = "; ".join(
            f"{ranks_text(sorted(rank for rank, at in place_of.items() if at == place))} at {text}"
            for place, text in sorted(text_of.items())
        )
        odd = sorted(rank for rank, place in place_of.items() if place != usual)
        step, layer = divmod(usual, _LAYERS)
        return RanksDiverged(
            step=step, layer=self.layers[layer - 1] if layer else "", phase=self.phase, ranks=odd, details=where
        )

    def _text_of(self, place: int) -> str:
        step, layer = divmod(place, _LAYERS)
        return place_text(step, self.phase, self.layers[layer - 1] if layer else "")

    @contextmanager
    def blocking(self, op: str, group: dist.ProcessGroup) -> Iterator[None]:
        """Note a collective that the code inside makes by itself and that the host waits for."""
        started = self._note(op, group, None)
        yield
        started.ended = started.waited_for = True
        self.close_ended()

    def close_ended(self) -> None:
        """Let go of the collectives that were waited for and have ended: their work would keep their tensors alive."""
        still_open = []
        for started in self._open:
            if started.waited_for and not started.is_open:
                started.ended, started.work = True, None
            else:
                still_open.append(started)
        self._open = still_open

    def read(self) -> Activity:
        """A snapshot, from any thread."""
        now = time.monotonic()
        waits_in = next((started for started in self._open if started.is_open), None)
        return Activity(
            step=self.step,
            layer=self.shown_layer,
            phase=self.phase,
            phase_s=now - self.since,
            waits_in=None if waits_in is None else waits_in.read(now),
            started=dict(self._started),
            recent={
                (group, index): place_text(step, phase, layer)
                for group, index, step, layer, phase in tuple(self._recent)
            },
        )

    def _note(self, op: str, group: dist.ProcessGroup, splits: Splits | None) -> Started:
        name = group.group_name
        if name not in self._members:
            self._members[name] = tuple(dist.get_process_group_ranks(group))
        index = self._started[name] = self._started.get(name, 0) + 1
        started = Started(
            self,
            op,
            name,
            index,
            self._members[name],
            self.step,
            self.shown_layer,
            self.phase,
            time.monotonic(),
            splits,
        )
        # A new list each time, never changed in place: another thread may be reading the old one.
        self._open = [*self._open, started]
        self._recent.append((name, index, self.step, self.shown_layer, self.phase))
        return started
