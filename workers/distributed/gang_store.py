"""A torch Store for a gang of Ray actors: each rank keeps all values in its mailbox; Ray calls deliver them.

Unlike a TCPStore it listens at no port: only who can call the actors, which takes the cluster's token, can write to it.
A value goes to every rank at once, so that no rank has to wait inside another one's process.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

import ray
from torch._C._distributed_c10d import Store  # torch.distributed hides it from type checkers

from workers.distributed.mailbox import CONTROL_GROUP, Mailbox


class GangStore(Store):
    """The part of torch's Store that gloo, NCCL and torch.distributed use.

    A message that gets lost leaves a rank waiting until its time-out, as with any store.

    Keep it as long as the process groups: torch's C++ code calls it after `init_process_group` too.
    """

    def __init__(self, mailbox: Mailbox, epoch: int, rank: int, actors: Sequence[Any]) -> None:
        """actors: those of all ranks, by rank. mailbox: this rank's own."""
        super().__init__()
        self._mailbox = mailbox
        self._epoch = epoch
        self._rank = rank
        self._mailboxes = [actor.mailbox.options(concurrency_group=CONTROL_GROUP) for actor in actors]

    def set(self, key: str, value: Any) -> None:  # bytes, which torch's stub calls a text
        self._mailbox.put(self._epoch, key, value)
        for mailbox in (*self._mailboxes[: self._rank], *self._mailboxes[self._rank + 1 :]):
            mailbox.remote("put", self._epoch, key, value)

    def get(self, key: str) -> bytes:
        return self._mailbox.wait(self._epoch, [key], self._timeout_s)[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._mailbox.wait(self._epoch, keys, timeout.total_seconds() if timeout else self._timeout_s)

    def check(self, keys: Sequence[str]) -> bool:
        return self._mailbox.has(self._epoch, keys)

    def add(self, key: str, amount: int) -> int:
        """Add to a number and return the sum. Numbers are kept by rank 0 alone; only `add` reads them."""
        if self._rank == 0:
            return self._mailbox.add(self._epoch, key, amount)
        return int(ray.get(self._mailboxes[0].remote("add", self._epoch, key, amount)))

    @property
    def _timeout_s(self) -> float:
        timeout: timedelta = self.timeout  # type: ignore[attr-defined] # torch's stub lacks it
        return timeout.total_seconds()

    def clone(self) -> Self:
        """Return this store itself: torch asks for a clone to use a store from another thread, and any may use this."""
        return self
