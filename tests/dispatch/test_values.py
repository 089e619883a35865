"""Plain values between ranks: what is sent arrives, and nothing else is taken."""

import base64
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dispatch.values import BadValue, all_gather_values, list_of, read_tensor, tensor_value
from tests.ranks import run_ranks


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def _send_as(raw):
    """What a rank would send that does not use `all_gather_values`."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(lengths, torch.tensor([len(raw)]))
    if max(lengths) > 1000:
        return
    padded = torch.frombuffer(bytearray(raw.ljust(int(max(lengths)), b"\0")), dtype=torch.uint8)
    dist.all_gather([torch.empty_like(padded) for _ in lengths], padded)


def _take(rank, world_size):
    group = dist.group.WORLD
    given = [{"a": [1, None, 2.5, True]}, "x" * 100]
    assert all_gather_values(given[rank], group, lambda value: value) == given
    refused = []
    for raw in (
        pickle.dumps(_Evil()),
        b"[" * 1000,  # deeper than Python's stack
        b"",
        b"[true]",  # no int
        b"x" * 1001,
    ):
        if rank == 0:
            _send_as(raw)
            continue
        with pytest.raises(BadValue) as caught:
            all_gather_values([7], group, list_of(int), max_bytes=1000)
        refused.append(str(caught.value))
    return refused


def test_values_of_all_ranks_arrive_by_rank_and_nothing_else_is_taken():
    refused = run_ranks(2, _take)[1]
    assert len(refused) == 5
    assert all("rank 0 of the group sent" in text for text in refused[:4])
    assert refused[4] == "rank 0 of the group would send 1001 bytes; at most 1000 are taken"


def test_a_process_on_its_own_hears_itself():
    assert all_gather_values((1, 2), None, list_of(int)) == [[1, 2]]


def test_a_tensor_comes_back_bit_for_bit_whatever_its_dtype_and_shape():
    tensors = [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.tensor([[1.0, float("nan"), -0.0]]),
        torch.zeros(0, 4, dtype=torch.float64),
        torch.arange(6).view(2, 3).T,
    ]
    for tensor in tensors:
        [back] = all_gather_values(tensor_value(tensor), None, read_tensor)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert tensor_value(back) == tensor_value(tensor)
    four_bytes = base64.b64encode(b"1234").decode()
    for bad in (
        ("float32", [2], four_bytes),
        ("float32", [-1], ""),
        ("load", [1], four_bytes),
        ("float32", [1 << 40], ""),
    ):
        with pytest.raises(BadValue):
            all_gather_values(bad, None, read_tensor)


def test_no_package_calls_what_unpickles_the_words_of_other_ranks():
    root = Path(__file__).parents[2]
    sources = [path for name in ("dispatch", "workers", "cluster", "runtime") for path in root.glob(f"{name}/**/*.py")]
    assert len(sources) > 100
    # The last two are of DCP, and call the others.
    calls = re.compile(r"\.(all_gather|gather|broadcast|scatter)_object|state_dict_(saver|loader) import")
    assert [str(path) for path in sources if calls.search(path.read_text())] == []
