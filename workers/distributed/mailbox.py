"""Holds, on each rank, the values that the ranks exchange when they join, such as socket addresses.

Ray's calls between actors carry them, which demand the cluster's token: there is no port that another user of the
machine, or of the network, could write to. Nothing here imports torch or Ray: the actor sets up its process first.
"""

import threading
from collections.abc import Sequence

# Concurrency group of a Ray actor: calls in it, such as those to its mailbox, are answered while a long call runs.
CONTROL_GROUP = "ctl"


class Mailbox:
    """One rank's copy of the values of all ranks, by epoch of the gang and by key. May be used from any thread.

    Other ranks may write before this one calls `open` for their epoch, so values of later epochs are kept too.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], bytes] = {}
        self._epoch = 0
        self._last_closed = -1
        self._changed = threading.Condition(threading.RLock())

    def open(self, epoch: int) -> None:
        """Begin an epoch and drop the values of earlier ones."""
        with self._changed:
            self._epoch = epoch
            self._values = {key: value for key, value in self._values.items() if key[0] >= epoch}

    def close(self, epoch: int) -> None:
        """Make every `wait` for this epoch or an earlier one fail at once: the other ranks will not come any more."""
        with self._changed:
            self._last_closed = max(self._last_closed, epoch)
            self._changed.notify_all()

    def put(self, epoch: int, key: str, value: bytes) -> None:
        """Keep a value; it replaces an earlier one of the same key."""
        with self._changed:
            if epoch >= self._epoch:
                self._values[epoch, key] = value
                self._changed.notify_all()

    def add(self, epoch: int, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum. All ranks must use the mailbox of one rank for it."""
        with self._changed:
            total = int(self._values.get((epoch, key), b"0")) + amount
            self.put(epoch, key, str(total).encode())
            return total

    def has(self, epoch: int, keys: Sequence[str]) -> bool:
        """Whether all of these keys have a value."""
        return all((epoch, key) in self._values for key in keys)

    def wait(self, epoch: int, keys: Sequence[str], timeout_s: float) -> list[bytes]:
        """Wait for a value of each key and return them. Raises TimeoutError, at once if the epoch is closed."""
        with self._changed:
            self._changed.wait_for(lambda: epoch <= self._last_closed or self.has(epoch, keys), timeout_s)
            if not self.has(epoch, keys):
                missing = [key for key in keys if (epoch, key) not in self._values]
                why = "the gang has failed" if epoch <= self._last_closed else f"{timeout_s:g} s have passed"
                raise TimeoutError(f"Timed out waiting for {missing[0]} of another rank: {why}")
            return [self._values[epoch, key] for key in keys]
