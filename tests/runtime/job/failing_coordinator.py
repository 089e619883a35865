"""The real coordinator actor with a plan: it dies, or keeps its caller waiting, where a file of that name says so."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from runtime.job import coordinator
from runtime.job.coordinator import CoordinatorActor, CoordinatorClient, start_coordinator

RECEIVED, COMPUTED, SLOW = "received", "computed", "slow"
LIMIT_S = 60.0


def actor_class_in(folder: Path) -> type[CoordinatorActor]:
    """Ray sends a class that was made in a function by value: the folder travels inside."""

    class PlannedCoordinator(CoordinatorActor):
        def handle(self, raw: bytes) -> bytes:
            self._die_at(RECEIVED)
            answer = super().handle(raw)
            self._die_at(COMPUTED)
            give_up = time.monotonic() + LIMIT_S
            while (folder / SLOW).exists() and time.monotonic() < give_up:
                time.sleep(0.01)
            return answer

        def _die_at(self, point: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                (folder / point).unlink()  # once: the one that Ray starts instead lives
                os._exit(1)

    return PlannedCoordinator


@dataclass
class FailingCoordinator:
    """The actor and what can be done to it, from outside or by plan."""

    actor: Any
    folder: Path

    @classmethod
    def start(cls, folder: Path) -> "FailingCoordinator":
        with patch.object(coordinator, "CoordinatorActor", actor_class_in(folder)):
            return cls(start_coordinator("run"), folder)

    def client(self, timeout_s: float = 1.0) -> CoordinatorClient:
        return CoordinatorClient(self.actor, timeout_s)

    def plan(self, point: str) -> None:
        (self.folder / point).touch()

    def planned(self, point: str) -> bool:
        return (self.folder / point).exists()

    def cancel(self, point: str) -> None:
        (self.folder / point).unlink()

    def status(self) -> dict[str, Any]:
        """Waits until it is up, again if need be."""
        give_up = time.monotonic() + LIMIT_S
        while True:
            try:
                status: dict[str, Any] = ray.get(self.actor.status.remote(), timeout=LIMIT_S)
            except ray.exceptions.RayActorError:
                assert time.monotonic() < give_up
                time.sleep(0.05)
            else:
                return status

    def kill(self) -> None:
        os.kill(self.status()["pid"], signal.SIGKILL)

    def kill_on_the_way(self, raw: bytes) -> bytes:
        """Call it, dead before the message is read: it is stopped, called, and killed."""
        pid = self.status()["pid"]
        os.kill(pid, signal.SIGSTOP)
        reference = self.actor.handle.remote(raw)
        os.kill(pid, signal.SIGKILL)
        answer: bytes = ray.get(reference, timeout=LIMIT_S)
        return answer


@dataclass
class Switch:
    """A client whose calls can be led elsewhere, and whose answers are followed by something, once each."""

    client: CoordinatorClient
    instead: Callable[[bytes], bytes] | None = None
    after: Callable[[], None] | None = None

    def __call__(self, raw: bytes) -> bytes:
        call, self.instead = self.instead or self.client, None
        answer = call(raw)
        if (after := self.after) is not None:
            self.after = None
            after()
        return answer
