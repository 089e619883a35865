"""What an MoE layer did: seconds by phase, assignments and bytes, collected over the micro-batches of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.activity import MOE_PHASES
from dispatch.diagnosis.activity_tracker import ActivityTracker, in_backward


@dataclass(frozen=True)
class Message:
    """One all-to-all as it was handed to the backend: rows for and from each rank of the group, none for itself."""

    row_bytes: int
    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Reading:
    """Totals of one rank since the last `Meter.take`.

    seconds: by phase, forward, backward and recompute together. routed, sent, received, returned: (token, expert)
    assignments, first forward only, so that they are equal when no token is lost. sent_bytes: handed to other ranks in
    forward, backward and recompute; network_bytes: those that left the node, as far as the exchange knows nodes.
    busiest_rows: for each layer call in order, rows of the busiest local expert.
    """

    seconds: dict[str, float]
    routed: int
    sent: int
    received: int
    returned: int
    sent_bytes: int
    network_bytes: int
    busiest_rows: tuple[int, ...]


@dataclass
class Meter:
    """Collects a `Reading`. One per model; not thread-safe. On CUDA it uses events and waits only in `take`.

    messages: a list put here is given every message, for who wants to repeat them; it is never emptied. tracker: where
    this thread says what it is in, and starts its collectives.
    """

    tracker: ActivityTracker = field(default_factory=ActivityTracker)
    messages: list[Message] | None = None
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _counts: dict[str, int | Tensor] = field(default_factory=lambda: defaultdict(int))
    _busiest_rows: list[int] = field(default_factory=list)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def span(self, phase: str, device: torch.device) -> Iterator[None]:
        """Charge the time inside to `phase`, and say so on the tracker. An exception leaves the span uncharged."""
        with self.tracker.in_phase(phase):
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._events.append((phase, start, end))
            else:
                began = time.perf_counter()
                yield
                self._seconds[phase] += time.perf_counter() - began

    def count(self, **assignments: int) -> None:
        """Add to routed, sent, received or returned. A recompute repeats assignments, so it is not counted."""
        if not in_backward():
            for name, number in assignments.items():
                self._counts[name] += number

    def note_message(self, message: Message, link: str) -> None:
        """Count the bytes of a message, and keep it where `messages` are wanted."""
        if self.messages is not None:
            self.messages.append(message)
        self.count_bytes(message.row_bytes * sum(message.input_splits), link)

    def count_bytes(self, sent_bytes: int | Tensor, link: str) -> None:
        """Add bytes handed to other ranks over a kind of link, "node" or "network", whatever the pass.

        sent_bytes: an int64 scalar on the device where the host does not know them; only `take` reads it.
        """
        self._counts["sent_bytes"] += sent_bytes
        self._counts["network_bytes"] += sent_bytes if link == "network" else 0

    def note_rows(self, busiest_rows: int) -> None:
        """Record the rows of the busiest local expert of one layer call."""
        if not in_backward():
            self._busiest_rows.append(busiest_rows)

    def take(self) -> Reading:
        """Return the totals and start anew. Waits for the device when there are CUDA spans."""
        if self._events:
            torch.cuda.synchronize()
        for phase, start, end in self._events:
            self._seconds[phase] += start.elapsed_time(end) / 1e3
        names = ("routed", "sent", "received", "returned", "sent_bytes", "network_bytes")
        reading = Reading(
            seconds={phase: self._seconds[phase] for phase in MOE_PHASES},
            busiest_rows=tuple(self._busiest_rows),
            **{name: int(self._counts[name]) for name in names},
        )
        self._seconds.clear()
        self._counts.clear()
        self._busiest_rows.clear()
        self._events.clear()
        return reading
