"""A wire that delays and loses frames, for kernels without tc netem: `python wire.py LEFT RIGHT --delay-s 0.01`.

It runs in the switch's network namespace, carries every frame between two interfaces, and ends with its standard input.
A file of its own that imports nothing of the project: it starts in a tenth of a second.
"""

import argparse
import array
import collections
import fcntl
import random
import select
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946
# ETHTOOL_SRXCSUM, STXCSUM, SSG, STSO, SGSO, SGRO of linux/ethtool.h. With any of them on, frames that the kernel means
# to cut or to check-sum later would reach the wire: longer than the MTU, or with a wrong checksum.
OFFLOADS = (0x15, 0x17, 0x19, 0x1F, 0x24, 0x2C)
MAX_QUEUED = 20_000  # Frames in each direction; further ones are dropped, as by a switch.
PACKET_OUTGOING = 4


def turn_off_offloads(interface: str) -> None:
    """Have the kernel send only whole, check-summed frames of at most the MTU."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for number in OFFLOADS:
            value = array.array("I", [number, 0])
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            try:
                fcntl.ioctl(control.fileno(), SIOCETHTOOL, request)
            except OSError:
                continue  # An interface without this one.


class Direction:
    """Frames on their way from one interface to the other, in order."""

    def __init__(
        self, source: socket.socket, sink: socket.socket, delay_s: float, jitter_s: float, loss: float
    ) -> None:
        self._source, self._sink = source, sink
        self._delay_s, self._jitter_s, self._loss = delay_s, jitter_s, loss
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()

    @property
    def due_s(self) -> float:
        """When the next frame leaves, on the monotonic clock."""
        return self._queue[0][0] if self._queue else float("inf")

    def take(self) -> None:
        """Read a frame that has come."""
        try:
            frame, (_, _, kind, _, _) = self._source.recvfrom(65535)
        except OSError:  # The interface went down; the kernel reports that once, and it may come back.
            return
        # A packet socket also receives what this process sends on the interface.
        if kind == PACKET_OUTGOING or random.random() < self._loss or len(self._queue) >= MAX_QUEUED:
            return
        due = time.monotonic() + self._delay_s + random.uniform(-self._jitter_s, self._jitter_s)
        last = self._queue[-1][0] if self._queue else due
        self._queue.append((max(due, last), frame))  # never overtaking: TCP would take that for loss

    def send_due(self) -> None:
        """Send what is due."""
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now:
            try:
                self._sink.send(self._queue.popleft()[1])
            except OSError:  # The link is cut, or the buffer full: the frame is lost.
                continue


def carry(left: str, right: str, delay_s: float, jitter_s: float, loss: float) -> None:
    """Carry frames both ways until standard input ends."""
    ends = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) for _ in range(2)]  # ETH_P_ALL
    for end, name in zip(ends, (left, right), strict=True):
        end.bind((name, 0))
    ways = {
        ends[0]: Direction(ends[0], ends[1], delay_s, jitter_s, loss),
        ends[1]: Direction(ends[1], ends[0], delay_s, jitter_s, loss),
    }
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        wait_s = min(1.0, max(0.0, min(way.due_s for way in ways.values()) - time.monotonic()))
        readable, _, _ = select.select([*ends, sys.stdin], [], [], wait_s)
        if sys.stdin in readable:
            return
        for end, way in ways.items():
            if end in readable:
                way.take()
        for way in ways.values():
            way.send_due()


def main() -> None:
    """Turn offloads off, and carry frames if there are two interfaces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("interfaces", nargs="+", help="offloads are turned off; the first two are connected")
    parser.add_argument("--delay-s", type=float, default=0.0, help="one way")
    parser.add_argument("--jitter-s", type=float, default=0.0, help="added or taken at random, up to this")
    parser.add_argument("--loss", type=float, default=0.0, help="share of frames")
    options = parser.parse_args()
    for interface in options.interfaces:
        turn_off_offloads(interface)
    if len(options.interfaces) > 1:
        left, right, *_ = options.interfaces
        carry(left, right, options.delay_s, options.jitter_s, options.loss)


if __name__ == "__main__":
    main()
