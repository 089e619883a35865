import os
from mmap import mmap

import psutil
import pytest
import torch

from workers.distributed.memory import held_bytes


def test_what_a_cpu_rank_holds_is_what_the_system_says_and_grows_with_a_tensor() -> None:
    before = held_bytes(torch.device("cpu"))
    assert before == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.05)
    kept = torch.frombuffer(mmap(-1, 2**26), dtype=torch.uint8).fill_(1)  # malloc could give what was freed before
    assert held_bytes(torch.device("cpu")) - before > 0.9 * kept.nbytes
