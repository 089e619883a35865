"""The network of machines: a switch, a link to each, and what can go wrong with a link."""

import contextlib
import select
import subprocess
import sys
from pathlib import Path

from runtime.commands.chaos.namespaces import COMMAND_S, Holder, NamespaceError, command

WIRE = Path(__file__).with_name("wire.py")


def address_of(index: int) -> str:
    """The address of a machine. The network reaches nothing else, so any number of switches may use it at once."""
    return f"10.231.0.{10 + index}"


class Network:
    """The links by the index of their machine. A link keeps its settings when its machine is booted again."""

    def __init__(self, switch: Holder) -> None:
        self._switch = switch
        self._holders: dict[int, Holder] = {}
        self._cut: set[int] = set()
        self._rates: dict[int, int] = {}
        self._delays: dict[int, tuple[float, float, float]] = {}
        self._wires: dict[int, subprocess.Popen[str]] = {}
        self._in_switch("ip", "link", "add", "br0", "type", "bridge")
        self._in_switch("ip", "link", "set", "br0", "up")

    def attach(self, index: int, machine: Holder) -> None:
        """Connect a machine that has just been booted, under the settings of its link."""
        port = f"p{index}"
        self._in_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        command(machine.enter(["--net"], ["ip", "addr", "add", f"{address_of(index)}/24", "dev", "eth0"]))
        # The same at each boot, since neighbours remember it (ARP) for some seconds. 02: locally administered.
        hardware_address = f"02:00:00:00:00:{index:02x}"
        command(machine.enter(["--net"], ["ip", "link", "set", "eth0", "address", hardware_address, "up"]))
        self._in_switch("ip", "link", "set", port, "master", "br0")
        self._holders[index] = machine
        self._set_up(index)
        if index in self._rates:
            self.limit(index, self._rates[index])
        if index in self._delays:
            self.delay(index, *self._delays[index])

    def detach(self, index: int) -> None:
        """Delete the link of a machine that has ended."""
        if self._holders.pop(index, None) is not None:
            self._stop_wire(index)
            # The kernel deletes it with the machine's network namespace, but some time later.
            with contextlib.suppress(NamespaceError):
                self._in_switch("ip", "link", "del", f"p{index}")

    def cut(self, index: int) -> None:
        """Drop all frames to and from a machine. No TCP reset is sent: connections just fall silent."""
        self._cut.add(index)
        self._set_up(index)

    def heal(self, index: int) -> None:
        """Undo `cut`."""
        self._cut.discard(index)
        self._set_up(index)

    def limit(self, index: int, bits_per_s: int | None) -> None:
        """Bound what a link carries in each direction; None lifts the bound.

        Raises:
            ValueError: a rate below 10 kbit/s, which carries no frame within the time-outs of anybody.
        """
        if bits_per_s is not None and bits_per_s < 10_000:
            raise ValueError(f"bits_per_s ({bits_per_s}) must be at least 10000; cut the link to carry nothing")
        self._rates.pop(index, None)
        if bits_per_s is not None:
            self._rates[index] = bits_per_s
        towards, away = self._switch, self._holders[index]
        for holder, interface in ((towards, f"p{index}"), (away, "eth0")):
            change = ["tc", "qdisc", "replace", "dev", interface, "root"]
            if bits_per_s is None:
                change += ["pfifo"]
            else:
                # Small, so that short transfers keep the rate too; tbf cuts the 64 KiB frames of segmentation offload.
                change += ["tbf", "rate", f"{bits_per_s}bit", "burst", "32kb", "latency", "200ms"]
            command(holder.enter(["--net"], change))

    def delay(self, index: int, delay_s: float, jitter_s: float = 0.0, loss: float = 0.0) -> None:
        """Delay every frame of a link, each way, by delay_s ± jitter_s, and lose this share of them.

        The frames go through Python: some ten thousand a second. `undelay` ends it.
        """
        self.undelay(index)
        self._delays[index] = (delay_s, jitter_s, loss)
        port, near, far = f"p{index}", f"w{index}", f"v{index}"
        self._in_switch("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        self._in_switch("ip", "link", "set", port, "nomaster")
        self._in_switch("ip", "link", "set", far, "master", "br0")
        self._in_switch("ip", "link", "set", near, "up")
        self._in_switch("ip", "link", "set", far, "up")
        command(self._holders[index].enter(["--net"], [sys.executable, str(WIRE), "eth0"]))
        settings = ["--delay-s", str(delay_s), "--jitter-s", str(jitter_s), "--loss", str(loss)]
        wire = subprocess.Popen(  # noqa: S603 Our own file.
            self._switch.enter(["--net"], [sys.executable, str(WIRE), port, near, far, *settings]),
            stdin=subprocess.PIPE,  # whose end ends it: this process's too
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._wires[index] = wire
        if wire.stdout is None or not select.select([wire.stdout], [], [], COMMAND_S)[0]:
            raise NamespaceError(f"the wire of link {index} did not start within {COMMAND_S:g} s")
        if (said := wire.stdout.readline()) != "ready\n":
            raise NamespaceError(f"the wire of link {index} did not start: {said}{wire.stdout.read()}")

    def undelay(self, index: int) -> None:
        """Undo `delay`."""
        if self._delays.pop(index, None) is not None:
            self._stop_wire(index)
            self._in_switch("ip", "link", "set", f"p{index}", "master", "br0")

    def close(self) -> None:
        """End the wires; the rest goes with the switch."""
        for index in list(self._wires):
            self._stop_wire(index)

    def _set_up(self, index: int) -> None:
        if index in self._holders:
            self._in_switch("ip", "link", "set", f"p{index}", "down" if index in self._cut else "up")

    def _stop_wire(self, index: int) -> None:
        wire = self._wires.pop(index, None)
        if wire is None:
            return
        for pipe in (wire.stdin, wire.stdout):
            if pipe is not None:
                pipe.close()
        try:
            wire.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            wire.kill()
            wire.wait(COMMAND_S)
        self._in_switch("ip", "link", "del", f"w{index}")

    def _in_switch(self, *arguments: str) -> None:
        command(self._switch.enter(["--net"], list(arguments)))
