"""Machines of real namespaces: their network, its faults, and that nothing of them is ever left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runtime.commands.chaos.machines import Machines
from runtime.commands.chaos.namespaces import NamespaceError, why_not
from tests.ray_fixture import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PYTHON = [sys.executable, "-S", "-E", "-c"]

# Echoes what a client sends, as often as it sends.
SERVER = """
import socket, threading
def serve(link):
    while data := link.recv(65536):
        link.sendall(data)
listener = socket.create_server(("", 7000))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

# Sends so many bytes there and back, and prints the seconds; a line on its input asks for each exchange.
CLIENT = """
import socket, sys, threading, time
host, limit_s = sys.argv[1], float(sys.argv[2])
deadline = time.monotonic() + limit_s
while True:
    try:
        link = socket.create_connection((host, 7000), timeout=limit_s)
        break
    except (ConnectionRefusedError, TimeoutError) as error:
        if time.monotonic() > deadline:
            sys.exit(type(error).__name__)
for count in map(int, sys.argv[3:]):
    begun, left = time.monotonic(), count
    threading.Thread(target=link.sendall, args=(bytes(count),), daemon=True).start()
    try:
        while left:
            data = link.recv(65536)
            if not data:
                sys.exit("closed")
            left -= len(data)
    except OSError as error:
        sys.exit(type(error).__name__)
    print(time.monotonic() - begun, flush=True)
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines(3, disk_bytes=2**20) as machines:
        machines[1].popen([*PYTHON, SERVER])
        yield machines


def exchange(machines: Machines, num_bytes: int = 1, *, source: int = 0, limit_s: float = 5.0) -> float:
    """Seconds for so many bytes from machine `source` to the server and back; TimeoutError after limit_s of silence."""
    done = machines[source].run([*PYTHON, CLIENT, machines[1].name, str(limit_s), "1", str(num_bytes)])
    if done.returncode:
        raise TimeoutError(done.stderr)
    return float(done.stdout.split()[-1])


def test_a_machine_has_a_name_an_address_and_processes_of_its_own(machines):
    for machine in machines:
        done = machine.run(["sh", "-c", "hostname; getent hosts $(hostname); ls -d /proc/[0-9]* | wc -l"])
        name, address, num_processes = done.stdout.splitlines()
        assert (name, address.split()) == (machine.name, [machine.address, machine.name])
        assert int(num_processes) < 12  # the host runs many more
    assert exchange(machines) < 1
    assert exchange(machines, source=2) < 1


def test_a_cut_link_carries_nothing_and_a_healed_one_goes_on(machines):
    machines.network.cut(1)
    with pytest.raises(TimeoutError, match="TimeoutError"):
        exchange(machines, limit_s=0.5)
    machines.network.heal(1)
    assert exchange(machines) < 3


def test_a_limit_is_kept_in_both_directions_and_can_be_lifted(machines, tmp_path):
    code = "import json, sys, time; from runtime.commands.doctor.cluster.probe import Probe; "
    code += "ip = sys.argv[1]; probe = Probe(b'token'); "
    serve = code + "print(probe.listen(ip), flush=True); time.sleep(100)"
    measure = code + "print(json.dumps(probe.measure(ip, int(sys.argv[2]), 4.0)))"
    machines[1].popen([sys.executable, "-c", serve, machines[1].address], env=ENV, output=tmp_path / "port")
    wait_until((tmp_path / "port").read_text)

    def rates() -> list[float]:
        arguments = [machines[1].address, (tmp_path / "port").read_text()]
        done = machines[0].run([sys.executable, "-c", measure, *arguments], env=ENV)
        found = json.loads(done.stdout)
        return [found["out_bytes_per_s"], found["in_bytes_per_s"]]

    machines.network.limit(0, 10 * 10**6)
    assert all(0.3e6 < rate < 2e6 for rate in rates())  # 1.25 MB/s, and a burst of 32 KiB
    assert exchange(machines, 10**6, source=2) < 0.6  # another link; through the slow one it takes 0.8 s
    machines.network.limit(0, None)
    assert all(rate > 4e6 for rate in rates())


def test_a_delay_is_added_each_way_and_lost_frames_do_not_arrive(machines):
    machines.network.delay(0, 0.1, 0.01)
    assert 0.17 < exchange(machines) < 1.5
    assert 0.17 < exchange(machines, 10**6) < 10  # frames of full length too
    machines.network.delay(0, 0.0, loss=1.0)
    with pytest.raises(TimeoutError):
        exchange(machines, limit_s=0.5)
    machines.network.undelay(0)
    assert exchange(machines) < 0.15


def test_a_disk_is_full_when_it_is_full_and_for_its_machine_alone(machines):
    fill = "dd if=/dev/zero of={}/file bs=64k count=32"
    assert "No space left" in machines[0].run(["sh", "-c", fill.format(machines[0].disk)]).stderr
    assert machines[2].run(["ls", str(machines[2].disk)]).stdout == ""
    assert not list(machines[0].disk.iterdir())  # from outside


def test_a_killed_machine_takes_its_processes_along_and_can_be_booted_again(tmp_path):
    with Machines(2) as machines:
        server = machines[1].popen([*PYTHON, SERVER])
        arguments = [*PYTHON, CLIENT, machines[1].name, "2", "1", "1000000000"]  # longer than the test
        client = machines[0].popen(arguments, output=tmp_path / "client")
        wait_until(lambda: (tmp_path / "client").stat().st_size > 0)
        machines[1].kill()
        assert server.returncode == -signal.SIGKILL or server.returncode == 128 + signal.SIGKILL
        assert not machines[1].is_up
        assert client.wait(10) == 1
        assert re.search("closed|ConnectionResetError", (tmp_path / "client").read_text())
        with pytest.raises(ValueError, match="machine1 is down; boot it first"):
            machines[1].run(["true"])
        machines[1].boot()
        machines[1].popen([*PYTHON, SERVER])
        assert exchange(machines) < 3


def test_processes_are_listed_with_their_number_on_the_host_and_no_others(machines):
    machines[2].popen([*PYTHON, "import os, time; time.sleep(60)", "marked"])
    wait_until(lambda: any(each.command.endswith("marked") for each in machines[2].processes()))
    [marked] = [each for each in machines[2].processes() if each.command.endswith("marked")]
    assert marked.pid < marked.host_pid
    assert Path(f"/proc/{marked.host_pid}/cmdline").read_text().endswith("marked\0")
    assert not [each for each in machines[0].processes() if each.command.endswith("marked")]
    os.kill(marked.host_pid, signal.SIGKILL)
    wait_until(lambda: not any(each.command.endswith("marked") for each in machines[2].processes()))


def test_orphans_that_ended_are_reaped_so_that_nobody_takes_them_for_alive(machines):
    machines[2].run(["sh", "-c", "setsid sh -c 'sleep 0.01 & exec sleep 0.02 marked' & sleep 0.01"])
    wait_until(lambda: machines[2].run(["sh", "-c", "cat /proc/[0-9]*/comm"]).stdout.count("sleep") == 0)


def test_two_sets_of_machines_with_the_same_addresses_do_not_meet(machines):
    with Machines(3) as others:
        assert others[1].address == machines[1].address
        with pytest.raises(TimeoutError, match="ConnectionRefused"):
            exchange(others, limit_s=0.5)
        assert exchange(machines) < 1


OWNER = """
import sys
from runtime.commands.chaos.machines import Machines
from tests.runtime.commands.chaos.test_machines import PYTHON, SERVER
with Machines(2) as machines:
    machines[0].popen([*PYTHON, SERVER])
    machines.network.delay(1, 0.01)
    print(machines[0].disk.parent, flush=True)
    sys.stdin.read()
    raise LookupError
"""


@pytest.mark.parametrize("end", ["exception", "interrupt", "kill"])
def test_nothing_is_left_however_the_owner_ends(end):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    folder = Path(owner.stdout.readline().decode().strip())
    family = psutil.Process(owner.pid).children(recursive=True)
    assert folder.exists()
    assert len(family) >= 9  # machines and switch are held by two processes each; a wire; a server and its nsenter
    networks = {Path(f"/proc/{process.pid}/ns/net").readlink() for process in family}
    assert len(networks) >= 3
    if end == "interrupt":
        owner.send_signal(signal.SIGINT)
    if end == "kill":
        owner.kill()
    owner.communicate()
    assert owner.returncode == {"exception": 1, "interrupt": -signal.SIGINT, "kill": -signal.SIGKILL}[end]
    psutil.wait_procs(family, timeout=60)
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    wait_until(lambda: not folder.exists())


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"num_machines \(0\) must be from 1 to 200"):
        Machines(0)
    refusal = "import os; from runtime.commands.chaos.namespaces import why_not; os.setuid(65534); print(why_not())"
    done = subprocess.run([sys.executable, "-c", refusal], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "machines need root: they are network namespaces\n", done.stderr
    with Machines(1) as machines:
        with pytest.raises(ValueError, match=r"bits_per_s \(5\) must be at least 10000"):
            machines.network.limit(0, 5)
        with pytest.raises(ValueError, match="machine0 is up; kill it before"):
            machines[0].boot()
    with pytest.raises(NamespaceError, match="nsenter"):  # what a command says is passed on
        machines.network.delay(0, 0.1)


def wait_until(condition, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
