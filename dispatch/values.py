"""Small plain values between ranks, as JSON of bounded size; and numbers between device and host.

torch's `all_gather_object` is not used, since it unpickles what it receives: whoever can send to one rank could run
code on it.
"""

import base64
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The names, shapes and dtypes of 500,000 tensors fit, ten times those of the largest published model.
MAX_VALUE_BYTES = 1 << 26
_UNEXPECTED = (TypeError, ValueError, KeyError, AttributeError)


class BadValue(RuntimeError):
    """A rank sent a value that is too large, or not what the others expect."""


def all_gather_values(
    value: Any, group: dist.ProcessGroup | None, read: Callable[[Any], T], max_bytes: int = MAX_VALUE_BYTES
) -> list[T]:
    """The values of all ranks, by rank.

    Args:
        value: made of None, bool, int, float, str, list, tuple and dict with str keys; tuples arrive as lists.
        group: of any backend; None for a process on its own.
        read: checks and converts a received value; raises a TypeError, ValueError, KeyError or AttributeError for one
            that it does not expect.
    Raises:
        BadValue: a value is larger than `max_bytes`, is no JSON, or `read` refuses it. All ranks raise it.

    Collective.
    """
    raw = json.dumps(value).encode()
    return [_read(rank, part, read) for rank, part in enumerate(_all_gather_bytes(raw, group, max_bytes))]


def _all_gather_bytes(raw: bytes, group: dist.ProcessGroup | None, max_bytes: int) -> list[bytes]:
    if group is None:
        return [raw]
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    # Lengths go first: all_gather needs parts of equal size, and no rank shall make room for more than max_bytes.
    mine = torch.tensor([len(raw)], device=device)
    gathered = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    lengths = [int(length) for length in gathered]
    for rank, length in enumerate(lengths):  # the same on all ranks, so that all raise or none does
        if not 0 <= length <= max_bytes:
            raise BadValue(f"rank {rank} of the group would send {length} bytes; at most {max_bytes} are taken")
    padded = torch.frombuffer(bytearray(raw.ljust(max(lengths), b"\0")), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return [part.cpu().numpy().tobytes()[:length] for part, length in zip(parts, lengths, strict=True)]


def _read(rank: int, raw: bytes, read: Callable[[Any], T]) -> T:
    try:
        return read(json.loads(raw))
    except (*_UNEXPECTED, RecursionError) as error:  # the last from deeply nested lists
        raise BadValue(f"rank {rank} of the group sent an unexpected value: {type(error).__name__}: {error}") from error


def list_of(kind: type[T]) -> Callable[[Any], list[T]]:
    """A `read` for a list of values of one type; a bool is no int."""

    def read(value: Any) -> list[T]:
        if type(value) is not list or any(type(item) is not kind for item in value):
            raise TypeError(f"a list of {kind.__name__} is expected")
        return value

    return read


def tensor_value(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    """A tensor as a value to send, in base64: for tests and measurements, too slow for training."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    text = base64.b64encode(raw.numpy().tobytes()).decode()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), text


def read_tensor(value: Any) -> torch.Tensor:
    """The tensor of a `tensor_value`. Raises TypeError or ValueError for any other value."""
    dtype_name, shape, text = value
    raw = base64.b64decode(text, validate=True)
    dtype = getattr(torch, dtype_name)
    if not isinstance(dtype, torch.dtype) or any(type(size) is not int or size < 0 for size in shape):
        raise TypeError("the dtype and the shape of a tensor are expected")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are not a tensor of {dtype} {tuple(shape)}")
    if not raw:  # torch makes no tensor of an empty buffer
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for it.

    A copy to CUDA from memory that is not pinned makes the host wait until the device has done all its work.
    """
    goes_to_cuda = device.type == "cuda" and not host.is_cuda
    return host.pin_memory().to(device, non_blocking=True) if goes_to_cuda else host.to(device)


def host_lists(*tensors: Tensor) -> list[Any]:
    """The tensors, of one dtype and device, as nested lists. One copy to the host: it waits for the device once."""
    host = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = host.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).tolist() for part, tensor in zip(parts, tensors, strict=True)]
