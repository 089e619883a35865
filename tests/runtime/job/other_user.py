"""Another user of the machine, who tries every port beside real runs of `trimtab train`, in a network of their own.

Run by test_other_user.py as `python -m tests.runtime.job.other_user FOLDER`; prints what it saw as JSON.
"""

import contextlib
import encodings.idna  # noqa: F401 - connecting wants it, and the other user may not read where Python lies
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

ROOT = Path(__file__).parents[3]
NOBODY = 65534
LISTENS = "0A"  # state of a socket in /proc/net/tcp
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
# What torch's TCPStore wants to hear: VALIDATE with its magic number, then GETNUMKEYS, which it answers with an int64.
ASK_STORE = b"\0" + struct.pack("<I", 0x3C85F7CE) + b"\7"


def listening_ports() -> set[int]:
    rows = [line.split() for table in TABLES for line in table.read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENS}


def answers_as_store(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as link:
        link.sendall(ASK_STORE)
        readable, _, _ = select.select([link], [], [], 0.3)
        return bool(readable) and len(link.recv(64)) == 8
    return False


def tell_store(port: int, found: int) -> None:
    if answers_as_store(port):
        os.write(found, struct.pack("<H", port))


def hold(port: int, held: list[socket.socket]) -> None:
    """Stay connected, as the peer of the first number that gloo would give."""
    with contextlib.suppress(OSError):
        held.append(socket.create_connection(("127.0.0.1", port), timeout=1))
        held[-1].sendall(bytes(8))


def attack(found: int, spared: int) -> None:
    """Never returns. Writes each port that answers as a store into the pipe `found`."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    seen: set[int] = set()
    held: list[socket.socket] = []
    while True:
        new = listening_ports() - seen
        seen |= new
        for port in new - {spared}:  # first, since ranks join in a fraction of a second
            hold(port, held)
        for port in new:
            threading.Thread(target=tell_store, args=(port, found), daemon=True).start()
        time.sleep(0.002)


@contextlib.contextmanager
def attacker(found: int, spared: int) -> Iterator[None]:
    pid = os.fork()
    if not pid:
        try:
            attack(found, spared)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def train(folder: Path, name: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "runtime",
        "train",
        "--config=tiny",
        f"--name={name}",
        "--steps=15",
        "--device=cpu",
    ]
    command += [f"--run.dir={folder}", "--run.eval_every=0", f"--data.cache_dir={folder / 'cache'}"]
    command += [f"--data.path=[{ROOT / 'LICENSE'},{ROOT / 'dispatch'}]", "--data.suffixes=[.py]"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    folder = Path(sys.argv[1])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found, write_found = os.pipe()
    with attacker(write_found, store.port):
        joining = train(folder, "joining")
        said = joining.communicate(timeout=300)[0]
    training = train(folder, "training")
    metrics = folder / "training" / "metrics.jsonl"
    while training.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    with attacker(write_found, store.port):
        trained = training.communicate(timeout=300)[0]
    os.close(write_found)
    ports = os.read(found, 1 << 16)
    codes = {"joining": joining.returncode, "training": training.returncode}
    stores = sorted({*struct.unpack(f"<{len(ports) // 2}H", ports)} - {store.port})
    answered = store.port in struct.unpack(f"<{len(ports) // 2}H", ports)
    sys.stdout.write(
        json.dumps({**codes, "stores": stores, "control_answered": answered, "said": said, "trained": trained}) + "\n"
    )


if __name__ == "__main__":
    main()
