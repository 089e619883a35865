"""What Ctrl-C, SIGTERM and SIGHUP do to a command, and how often they count."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from runtime.terminal.interrupt import Stopped, StopSignal, stop_signals_raise
from tests.ray_fixture import ROOT

# Waits in C, where no handler of Python runs and a signal ends nothing, as in Ray's waits; then tells what it knows.
BLIND = """
import ctypes, os, signal, sys, threading
from runtime.terminal.interrupt import StopSignal, Stopped
read, write = os.pipe()
try:
    with StopSignal() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.siginterrupt(number, False)
        threading.Timer(1.0, os.write, (write, b"x")).start()
        print("ready", flush=True)
        ctypes.CDLL(None).read(read, ctypes.create_string_buffer(1), 1)
        print("waits no longer", stop.number, stop.exit_code, flush=True)
except Stopped as stopped:
    print("stopped", stopped.exit_code, flush=True)
"""


def end_of(signals: list[tuple[float, signal.Signals]], *, ignore_hup: bool = False) -> str:
    """What BLIND says after it got each signal at its time in seconds."""
    process = subprocess.Popen(
        [*(["nohup"] if ignore_hup else []), sys.executable, "-c", BLIND],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    for at, number in signals:
        time.sleep(max(0.0, begun + at - time.monotonic()))
        process.send_signal(number)
    return process.communicate(timeout=300)[0].strip()


@pytest.mark.parametrize(
    ("signals", "end"),
    [
        ([(0.1, signal.SIGINT)], "waits no longer 2 130"),
        ([(0.1, signal.SIGINT), (0.15, signal.SIGINT)], "stopped 130"),  # both while no handler can run
        ([(0.1, signal.SIGTERM), (0.15, signal.SIGTERM)], "stopped 143"),
        ([(0.1, signal.SIGTERM), (0.1, signal.SIGTERM)], "waits no longer 15 143"),  # as `timeout` sends it
        ([(0.1, signal.SIGHUP), (0.3, signal.SIGHUP), (0.5, signal.SIGTERM)], "waits no longer 1 129"),
    ],
)
def test_signals_are_counted_as_they_arrive_and_an_echo_or_a_hang_up_is_no_second_one(signals, end):
    assert end_of(signals) == end


def test_sighup_stays_ignored_where_nohup_ignored_it():
    assert end_of([(0.1, signal.SIGHUP)], ignore_hup=True) == "waits no longer None 0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_ends_by_sigterm_and_sighup_as_by_ctrl_c_with_the_code_of_a_shell(number):
    with pytest.raises(Stopped) as caught, stop_signals_raise():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does where a signal ends its wait
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_stop_wish_leaves_handlers_and_wakeup_as_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.stop_requested
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1


LASTING = """
import os, sys
from runtime.terminal.lasting_output import lasting_output
with lasting_output():
    print("first", flush=True)
    sys.stdin.readline()  # until the reader is gone
    print("second", flush=True)
    sys.stderr.write("third")
    os.write(int(sys.argv[1]), b"went on")
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_reader_that_is_gone_ends_nothing(kind):
    read, write = os.pipe() if kind == "pipe" else pty.openpty()
    told, tell = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", LASTING, str(tell)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=write,
        pass_fds=[tell],
        start_new_session=True,
    )
    os.close(write)
    os.close(tell)
    assert os.read(read, 100).startswith(b"first")
    os.close(read)
    process.communicate(b"\n", timeout=300)
    assert (process.returncode, os.read(told, 100)) == (0, b"went on")
    os.close(told)


def test_what_a_terminal_cannot_show_is_shown_by_its_number():
    script = "from runtime.terminal.lasting_output import lasting_output\nwith lasting_output(): print('\\xe9 \\udcff')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=300, check=True)
    assert done.stdout == b"\\xe9 \\udcff\n"
