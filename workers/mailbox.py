"""Where the ranks of a gang leave each other the addresses of their sockets, and each finds those of the others.

Ray's calls between actors carry them, which demand the cluster's token: there is no port that another user of the
machine, or of the network, could write to. Nothing here imports torch or Ray.
"""

import threading
from collections.abc import Sequence


class Mailbox:
    """One rank's copy of what all ranks have told, by epoch of the gang and by key. From any thread.

    Others may write before this rank begins to join, so it takes what comes for any epoch not yet past.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], bytes] = {}
        self._epoch = 0
        self._last_closed = -1
        self._changed = threading.Condition(threading.RLock())

    def open(self, epoch: int) -> None:
        """Begin an epoch: what was told in those before it is forgotten."""
        with self._changed:
            self._epoch = epoch
            self._values = {key: value for key, value in self._values.items() if key[0] >= epoch}

    def close(self, epoch: int) -> None:
        """End what waits, or will wait, for an epoch up to this one: the others will not come any more."""
        with self._changed:
            self._last_closed = max(self._last_closed, epoch)
            self._changed.notify_all()

    def put(self, epoch: int, key: str, value: bytes) -> None:
        """Keep a value; a later one of the same key takes its place."""
        with self._changed:
            if epoch >= self._epoch:
                self._values[epoch, key] = value
                self._changed.notify_all()

    def add(self, epoch: int, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum. All ranks must use the mailbox of the same one."""
        with self._changed:
            total = int(self._values.get((epoch, key), b"0")) + amount
            self.put(epoch, key, str(total).encode())
            return total

    def has(self, epoch: int, keys: Sequence[str]) -> bool:
        """Whether all of these keys have a value."""
        return all((epoch, key) in self._values for key in keys)

    def wait(self, epoch: int, keys: Sequence[str], timeout_s: float) -> list[bytes]:
        """The values of these keys, once all have one. Raises TimeoutError, at once where the epoch is closed."""
        with self._changed:
            self._changed.wait_for(lambda: epoch <= self._last_closed or self.has(epoch, keys), timeout_s)
            if not self.has(epoch, keys):
                missing = [key for key in keys if (epoch, key) not in self._values]
                why = "the gang has failed" if epoch <= self._last_closed else f"{timeout_s:g} s have passed"
                raise TimeoutError(f"Timed out waiting for {missing[0]} of another rank: {why}")
            return [self._values[epoch, key] for key in keys]
