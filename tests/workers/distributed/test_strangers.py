"""A gang does not start with a connection from somebody who is none of its ranks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from workers.distributed.connections import StrangerConnected, listening, refuse_strangers

# Gives a listener of gloo the first of its numbers, tells its own port, and stays until its input ends.
STRANGER = """
import socket, sys
held = socket.create_connection((sys.argv[1], int(sys.argv[2])))
held.sendall(bytes(8))
print(held.getsockname()[1], flush=True)
sys.stdin.read()
"""


def _start_stranger(ip: str, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-IS", "-c", STRANGER, ip, str(port)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _check_beside_a_stranger(rank: int, world_size: int, store_file: Path) -> str:
    before = listening()
    dist.new_group()
    store = dist.FileStore(str(store_file), world_size)
    if rank != 1:
        with pytest.raises(StrangerConnected) as caught:
            refuse_strangers(before, store, rank, world_size)
        return str(caught.value)
    with _start_stranger(*min(listening() - before)) as stranger:
        port = int(stranger.stdout.readline())
        planted = f"^127.0.0.1 port {port} is connected to rank 1 at 127.0.0.1"
        with pytest.raises(StrangerConnected, match=planted) as caught:
            refuse_strangers(before, store, rank, world_size)
        stranger.stdin.close()
    return str(caught.value)


def test_a_connection_from_another_process_is_refused_by_all_ranks_and_its_port_is_named(tmp_path):
    messages = run_ranks(3, _check_beside_a_stranger, tmp_path / "store")
    assert len(set(messages)) == 1
