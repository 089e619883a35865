"""What the MoE layers did in a step: seconds by phase, assignments and bytes, summed over its micro-batches."""

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
    """One all-to-all as it was handed to the backend: the rows to and from each rank of the group, 0 for itself."""

    row_bytes: int
    input_splits: list[int]
    output_splits: list[int]
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Reading:
    """Totals of one rank since the last `Meter.take`.

    seconds: by phase, in forward, backward and recompute. routed, sent, received, returned: (token, expert) assignments
    without those of recomputes; summed over ranks all four are equal unless a token is lost. sent_bytes: bytes handed
    to other ranks in forward, backward and recompute. network_bytes: those of them that left the node, or all of them
    where the exchange knows no nodes. busiest_rows: the rows of the busiest local expert, for each layer call in order.
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
    """Collects a `Reading`. One per model; not thread-safe. On CUDA it uses events, and waits only in `take`.

    messages: a list that gets every message, for benchmarks that repeat them; None keeps none. tracker: notes the
    phases of this thread and starts its collectives.
    """

    tracker: ActivityTracker = field(default_factory=ActivityTracker)
    messages: list[Message] | None = None
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _counts: dict[str, int | Tensor] = field(default_factory=lambda: defaultdict(int))
    _busiest_rows: list[int] = field(default_factory=list)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def span(self, phase: str, device: torch.device) -> Iterator[None]:
        """Add the time inside to `phase`, and note the phase on the tracker. After an exception no time is added."""
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
        """Add to routed, sent, received or returned. A recompute repeats assignments, so that it counts nothing."""
        if not in_backward():
            for name, count in assignments.items():
                self._counts[name] += count

    def note_message(self, message: Message, link: str) -> None:
        """Count the bytes of a message, and append it to `messages` if that is a list."""
        if self.messages is not None:
            self.messages.append(message)
        self.count_bytes(message.row_bytes * sum(message.input_splits), link)

    def count_bytes(self, sent_bytes: int | Tensor, link: str) -> None:
        """Add bytes handed to other ranks over a kind of link, "node" or "network", in any pass.

        sent_bytes: an int64 scalar on the device where the host does not know the number; only `take` waits for it.
        """
        self._counts["sent_bytes"] += sent_bytes
        self._counts["network_bytes"] += sent_bytes if link == "network" else 0

    def note_rows(self, busiest_rows: int) -> None:
        """Record the rows of the busiest local expert of one layer call; a recompute records nothing."""
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
