"""Tracks what a rank is doing: its phase and its collectives in flight, so that the driver can explain a hang.

A thread that hangs cannot say where. So each thread that starts collectives writes its step, layer and phase into an
`ActivityTracker`, and other threads `read` it for the driver, which compares the ranks. There is no lock, which would
cost time in every phase: only one thread writes, and it replaces values instead of changing them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dispatch.diagnosis.activity import MOE_PHASES, Activity, Collective, Splits
from dispatch.diagnosis.collective_errors import CollectiveTimeout, RanksDiverged, WrongSplits, place_text, ranks_text

_IN_BACKWARD = {phase: f"backward {phase}" for phase in MOE_PHASES}
_WITH_LAYER = frozenset([*MOE_PHASES, *_IN_BACKWARD.values()])
_PLACES_PER_STEP = 1 << 20  # place numbers of one step: 0 outside MoE layers, then one for each layer of the model
# Texts of gloo and NCCL. gloo has a second one, "Application timeout", for a collective between two ranks of which
# another collective has timed out before.
_TIMED_OUT = ("timed out", "Timed out", "timeout")
_HISTORY = 24  # collectives to remember: those of about three MoE layers


def in_backward() -> bool:
    """True inside an autograd backward pass: in a forward, that means activation recompute."""
    # The same test that torch.utils.checkpoint makes for its own bookkeeping.
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001 - no public name


@dataclass(eq=False, slots=True)
class PendingCollective:
    """A collective that a tracker has started.

    collective: its description, in which only `read` fills in `waited_s`. began_at, failed_at: seconds of
    time.monotonic; failed_at is 0 unless `wait` raised.
    """

    tracker: ActivityTracker
    collective: Collective
    began_at: float
    work: Any = None
    args: tuple[Any, ...] = ()  # the backend reads and writes these tensors until the end
    failed_at: float = 0.0
    waited_for: bool = False
    ended: bool = False

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait for the collective. On CUDA the current stream waits, and not the host.

        Raises:
            CollectiveTimeout: the backend's time limit ended; one rank alone does not know which ranks are missing.
        """
        try:
            if timeout is None:
                self.work.wait()
            else:
                self.work.wait(timeout)
        except RuntimeError as error:
            raise self._explained(error) from error
        self.waited_for, self.args = True, ()
        self.tracker.close_ended()

    def end(self) -> None:
        """Note that a message of `note_message` has arrived or been sent."""
        self.waited_for = self.ended = True
        self.tracker.close_ended()

    @property
    def is_open(self) -> bool:
        """Whether it has not ended. One that failed stays open, to show where this rank failed."""
        return not self.ended and (self.work is None or bool(self.failed_at) or not self.work.is_completed())

    def read(self, now: float) -> Collective:
        """A copy for another process, with the seconds that it has waited until `now` (of time.monotonic)."""
        return replace(self.collective, waited_s=(self.failed_at or now) - self.began_at)

    def _explained(self, error: RuntimeError) -> RuntimeError:
        self.failed_at = time.monotonic()
        if not any(text in str(error) for text in _TIMED_OUT):
            error.add_note(f"in {self.collective} ({self.collective.op})")
            return error
        return CollectiveTimeout(
            step=self.collective.step,
            layer=self.collective.layer,
            phase=self.collective.phase,
            waited_s=self.failed_at - self.began_at,
            missing_ranks=None,
            setting="the time-out of its process group",
        )


@dataclass(eq=False)
class ActivityTracker:
    """Step, layer and phase of one thread of a rank, and its collectives in flight. It starts every collective.

    layers: the names of the model's MoE layers, in order (`dispatch.layer.name_layers`). since: when the phase began,
    in seconds of time.monotonic.
    """

    layers: tuple[str, ...] = ()
    step: int = 0
    layer: str = ""
    phase: str = "idle"
    since: float = field(default_factory=time.monotonic)
    _started: dict[str, int] = field(default_factory=dict)
    _open: list[PendingCollective] = field(default_factory=list)
    _recent: deque[Collective] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    # By name: references to the groups would keep them, and their TCPStore, alive after the end of the gang.
    _members: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def set_phase(self, phase: str) -> None:
        """Note what this thread does from now on; a phase of an MoE layer is called backward inside backward."""
        self.phase = _IN_BACKWARD[phase] if phase in _IN_BACKWARD and in_backward() else phase
        self.since = time.monotonic()

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Enter a phase and return to the one before. After an exception the phase stays, to show where it happened."""
        before = self.phase
        self.set_phase(phase)
        yield
        self.phase, self.since = before, time.monotonic()

    @property
    def shown_layer(self) -> str:
        """The layer, or "" in a phase outside MoE layers."""
        return self.layer if self.phase in _WITH_LAYER else ""

    def start(
        self,
        op: Callable[..., Any],
        *args: Any,
        group: dist.ProcessGroup,
        splits: Splits | None = None,
    ) -> PendingCollective:
        """Start a collective of torch.distributed; the caller must wait for the result.

        Raises:
            WrongSplits: the splits to send are not those that this rank announced.
        """
        self.close_ended()
        name = group.group_name
        if name not in self._members:
            self._members[name] = tuple(dist.get_process_group_ranks(group))
        started = self._note(op.__name__, name, self._members[name], splits)
        if splits is not None and splits.sent != splits.announced:
            raise WrongSplits(
                step=self.step,
                layer=self.shown_layer,
                phase=self.phase,
                rank=dist.get_rank(),
                announced=splits.announced,
                sent=splits.sent,
            )
        started.args, started.work = args, op(*args, group=group, async_op=True)
        return started

    def run(self, op: Callable[..., Any], *args: Any, group: dist.ProcessGroup) -> None:
        """Start a collective and wait for it."""
        self.start(op, *args, group=group).wait()

    def note_message(self, op: str, name: str, members: tuple[int, int]) -> PendingCollective:
        """Note a message between two ranks that the caller starts itself; call `end` on the result when it is done.

        name: stands for the group's name; the same on both ranks, which must note its messages in the same order.
        members: the global ranks of sender and receiver.
        """
        self.close_ended()
        return self._note(op, name, members, None)

    @property
    def place_number(self) -> int:
        """Step and MoE layer as one int64: equal on all ranks that are at the same step and layer."""
        return self.step * _PLACES_PER_STEP + (self.layers.index(self.layer) + 1 if self.layer in self.layers else 0)

    def check_same_place(self, places: list[int], groups: list[dist.ProcessGroup]) -> None:
        """Raise RanksDiverged unless all ranks are at this rank's step and layer.

        places: `place_number` of each member of `groups`, group by group.
        """
        mine = self.place_number
        if all(place == mine for place in places):
            return
        ranks = [rank for group in groups for rank in dist.get_process_group_ranks(group)]
        raise self._diverged(dict(zip(ranks, places, strict=True)))  # a rank of two groups has one place

    def _diverged(self, places: dict[int, int]) -> RanksDiverged:
        """The error for ranks at different places. places: place number by global rank."""
        ranks_by_place = {p: sorted(rank for rank in places if places[rank] == p) for p in sorted({*places.values()})}
        # Where most ranks are. Of equals `max` takes the first: a rank ahead of others has left out a layer.
        common_place = max(ranks_by_place, key=lambda place: len(ranks_by_place[place]))
        step, layer = self._step_and_layer(common_place)
        diverged = sorted(places.keys() - ranks_by_place[common_place])
        details = "; ".join(
            f"{ranks_text(ranks)} at {self._place_text(place)}" for place, ranks in ranks_by_place.items()
        )
        return RanksDiverged(step=step, layer=layer, phase=self.phase, ranks=diverged, details=details)

    def _step_and_layer(self, place: int) -> tuple[int, str]:
        step, layer = divmod(place, _PLACES_PER_STEP)
        return step, self.layers[layer - 1] if layer else ""

    def _place_text(self, place: int) -> str:
        step, layer = self._step_and_layer(place)
        return place_text(step, self.phase, layer)

    def close_ended(self) -> None:
        """Drop the collectives that were waited for and have ended: torch's work handles keep their tensors alive."""
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
            recent={(each.group, each.index): str(each) for each in tuple(self._recent)},
        )

    def _note(self, op: str, name: str, members: tuple[int, ...], splits: Splits | None) -> PendingCollective:
        index = self._started[name] = self._started.get(name, 0) + 1
        collective = Collective(
            op=op,
            group=name,
            index=index,
            members=members,
            step=self.step,
            layer=self.shown_layer,
            phase=self.phase,
            waited_s=0.0,
            splits=splits,
        )
        started = PendingCollective(self, collective, time.monotonic())
        # A new list each time, never changed in place: another thread may be reading the old one.
        self._open = [*self._open, started]
        self._recent.append(collective)
        return started
