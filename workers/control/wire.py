"""What travels on the control path: reductions over ranks along a tree, and messages.

Messages are msgpack with a strict schema, raw little-endian tensors and size limits, without pickle.

all ranks → all ranks: `tree_all_reduce`, in ceil(log2 W) hops up a binomial tree of W ranks and as many down, where a
ring makes 2 (W - 1). The parent of rank r is r without its lowest set bit: there r sends the sums of its subtree, and
from there it receives the totals. A hop carries all tensors in one message, so that a step pays each latency once.

rank 0 → coordinator: LoadReport. Back: BiasUpdate, NeedState or Refusal. rank 0 → all ranks: BiasUpdate or Refusal.
A crc32 of all that follows comes first, so that a damaged message is refused as a whole and changes nothing.

Shapes: N = experts of all MoE layers (see dispatch.layout), M = all counts of the law, the load first.
"""

import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout

PROTOCOL_VERSION = 3
# 16 times the routed experts of the largest published model.
MAX_EXPERTS_TOTAL = 1 << 20
# Bounds the memory that a message of unknown origin can make a process take. The largest honest messages, with the
# histograms of a model of 61 x 256 experts, have 119 MiB.
MAX_MESSAGE_BYTES = 1 << 28
_MAX_REASON_CHARS = 600
_SEAL_BYTES = 4
_LENGTH_BYTES = 8
_MAX_INT = (1 << 63) - 1
_TREE_TAG = 7  # any number serves: no other point-to-point messages travel in this group


class WireError(ValueError):
    """A message that is not of this protocol: too large, damaged, or with a field missing, unknown or out of range."""


@dataclass(frozen=True, eq=False)
class VersionedState:
    """A law state and the number of updates that led to it. Two ranks agree where version and checksum are equal."""

    version: int
    state: LawState

    @cached_property
    def checksum(self) -> int:
        """crc32 of bias and extras. Without extras it equals `dispatch.balance.bias_checksum`."""
        packed = self.state.to_wire()
        crc = zlib.crc32(packed["bias"][1])
        for name, (dtype, raw) in sorted(packed["extras"].items()):
            crc = zlib.crc32(raw, zlib.crc32(f"{name} {dtype}".encode(), crc))
        return crc


@dataclass(frozen=True, kw_only=True, eq=False)
class Seed:
    """All that a coordinator that has just started needs: the law, its layers and the state of the report's base."""

    config: BalanceConfig
    layout: LoadLayout
    state: LawState


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadReport:
    """The global counts of one step, and the law state (the base) that its update must start from.

    base_version, base_checksum and law_checksum identify base and law without sending them; `seed` sends them.
    """

    run_id: str
    step: int
    base_version: int
    base_checksum: int
    law_checksum: int
    counts_M: Tensor
    seed: Seed | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BiasUpdate:
    """The whole law state after the load of `step`. It was made from the state of version - 1."""

    step: int
    version: int
    state: LawState


@dataclass(frozen=True, kw_only=True)
class NeedState:
    """The coordinator does not hold the state that this report builds on: send the report again with a seed."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The coordinator's answer where no update will come, and why."""

    reason: str


Message = LoadReport | BiasUpdate | NeedState | Refusal


def law_checksum(config: BalanceConfig, layout: LoadLayout) -> int:
    """Checksum of a law's settings and layers: two processes with the same one compute the same updates."""
    return zlib.crc32(msgpack.packb([asdict(config), asdict(layout)]))


def max_message_bytes(law: Law) -> int:
    """Upper bound of any message about a law: 8 B per count, 64 B per expert for bias and extras, 1 MiB for names."""
    return (1 << 20) + 8 * law.num_counts + 64 * law.layout.total


def encode(message: Message) -> bytes:
    """Serialise a message; equal messages give equal bytes."""
    kind = type(message).__name__
    write, _ = _SCHEMA[kind]
    return sealed(bytes(msgpack.packb({"protocol": PROTOCOL_VERSION, "kind": kind, **write(message)})))


def sealed(body: bytes) -> bytes:
    """Prefix a message body with its crc32."""
    return zlib.crc32(body).to_bytes(_SEAL_BYTES, "little") + body


def decode(raw: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Read a message of at most `max_bytes` and check all of it.

    Raises:
        WireError: it is not exactly what `encode` writes, or a number in it is negative, too large or not finite.
    """
    if not isinstance(raw, bytes):
        raise WireError(f"a {type(raw).__name__} is no message")
    if len(raw) > max_bytes:
        raise WireError(f"message of {len(raw)} bytes; at most {max_bytes} for the layers of this law")
    body = raw[_SEAL_BYTES:]
    if sealed(body) != raw:
        raise WireError("the message does not match its checksum")
    try:
        fields = msgpack.unpackb(body, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not a msgpack message: {error}") from error
    if not isinstance(fields, dict) or fields.pop("protocol", None) != PROTOCOL_VERSION:
        raise WireError(f"not a message of protocol {PROTOCOL_VERSION}; run one version of trimtab on all machines")
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _SCHEMA:
        raise WireError(f"unknown kind of message {kind!r:.60}")
    _, read = _SCHEMA[kind]
    try:
        return read(fields)
    except (TypeError, KeyError, ValueError) as error:
        raise WireError(f"{kind}: {error}") from error


def mail_bytes(law: Law) -> int:
    """Size of the broadcast from rank 0 to all ranks: fixed, so that no rank has to learn a length first."""
    largest = encode(BiasUpdate(step=_MAX_INT, version=_MAX_INT, state=law.initial_state()))
    return _LENGTH_BYTES + max(4096, len(largest))  # 4096: room for any Refusal


def write_mail(mail: Tensor, message: BiasUpdate | Refusal) -> None:
    """Put a message into the uint8 tensor that rank 0 broadcasts: its length, then its bytes.

    What follows from an earlier, longer message is not read.
    """
    raw = encode(message)
    framed = len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
    mail[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)


def read_mail(mail: Tensor) -> Message:
    """Read what `write_mail` wrote. Raises WireError as `decode` does."""
    raw = mail.numpy().tobytes()
    return decode(raw[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")])


def _write_report(report: LoadReport) -> dict[str, Any]:
    counts = report.counts_M.numpy().astype("<i8").tobytes()
    seed = report.seed and {
        "config": asdict(report.seed.config),
        "layout": asdict(report.seed.layout),
        "state": report.seed.state.to_wire(),
    }
    named = ("run_id", "step", "base_version", "base_checksum", "law_checksum")
    return {name: getattr(report, name) for name in named} | {"counts": counts, "seed": seed}


def _read_report(fields: dict[str, Any]) -> LoadReport:
    kinds = dict.fromkeys(("step", "base_version", "base_checksum", "law_checksum"), int)
    _check(fields, run_id=str, counts=bytes, seed=(dict, type(None)), **kinds)
    if len(counts := fields.pop("counts")) % 8:
        raise WireError(f"{len(counts)} bytes are no counts of 8 bytes each")
    counts_M = torch.from_numpy(np.frombuffer(counts, dtype="<i8").astype(np.int64))
    if bool((counts_M < 0).any()):
        raise WireError(f"a count is negative: {int(counts_M.min())}")
    if fields["base_version"] == _MAX_INT:
        raise WireError(f"base_version ({_MAX_INT}) has no successor")
    return LoadReport(counts_M=counts_M, seed=_read_seed(fields.pop("seed")), **fields)


def _read_seed(fields: dict[str, Any] | None) -> Seed | None:
    if fields is None:
        return None
    _check(fields, config=dict, layout=dict, state=dict)
    module = fields["config"].get("module")
    if module is not None and module not in sys.modules:
        # A message must not make a process import code: the modules are named where the process is started.
        raise WireError(f"the law's module {module!r:.60} is not loaded here")
    return Seed(
        config=BalanceConfig(**fields["config"]),
        layout=_read_layout(fields["layout"]),
        state=_read_state(fields["state"]),
    )


def _read_layout(fields: dict[str, Any]) -> LoadLayout:
    _check(fields, names=list, num_experts=list, balanced=list)
    for name, kind in (("names", str), ("num_experts", int), ("balanced", bool)):
        if not all(type(value) is kind for value in fields[name]):
            raise WireError(f"{name} must hold {kind.__name__} only")
    if not all(number >= 1 for number in fields["num_experts"]) or sum(fields["num_experts"]) > MAX_EXPERTS_TOTAL:
        raise WireError(f"num_experts must be at least 1 in each layer, and {MAX_EXPERTS_TOTAL} together at most")
    return LoadLayout(**{name: tuple(values) for name, values in fields.items()})


def _read_state(fields: dict[str, Any]) -> LawState:
    _check(fields, bias=list, extras=dict)
    state = LawState.from_wire(fields)
    for name, value in {"bias": state.bias_N, **state.extras}.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise WireError(f"{name} is not finite")
    return state


def _write_update(update: BiasUpdate) -> dict[str, Any]:
    return {"step": update.step, "version": update.version, "state": update.state.to_wire()}


def _read_update(fields: dict[str, Any]) -> BiasUpdate:
    _check(fields, step=int, version=int, state=dict)
    return BiasUpdate(step=fields["step"], version=fields["version"], state=_read_state(fields["state"]))


def _read_need(fields: dict[str, Any]) -> NeedState:
    _check(fields, step=int)
    return NeedState(**fields)


def _read_refusal(fields: dict[str, Any]) -> Refusal:
    _check(fields, reason=str)
    return Refusal(**fields)


def _check(fields: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> None:
    """Refuse anything but exactly these fields of exactly these types (a bool is no int), integers in [0, 2**63)."""
    if fields.keys() != kinds.keys():
        raise WireError(f"fields are {sorted(fields)!s:.300}, they must be {sorted(kinds)}")
    for name, kind in kinds.items():
        value = fields[name]
        if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise WireError(f"{name} is of type {type(value).__name__}")
        if isinstance(value, int) and not 0 <= value <= _MAX_INT:
            raise WireError(f"{name} ({value}) is out of range")


# By class of the message: what makes its fields, and what makes the message from fields.
_SCHEMA: dict[str, tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Message]]] = {
    "LoadReport": (_write_report, _read_report),
    "BiasUpdate": (_write_update, _read_update),
    "NeedState": (asdict, _read_need),
    "Refusal": (lambda refusal: {"reason": refusal.reason[:_MAX_REASON_CHARS]}, _read_refusal),
}


def tree_all_reduce(sums: Sequence[Tensor], maxima: Tensor, *, group: dist.ProcessGroup, async_op: bool) -> "Reduction":
    """Reduce tensors over all ranks of a gloo group in place: `sums` by their sum, `maxima` by the largest.

    Args:
        sums, maxima: contiguous, on the CPU, int64 or float64, of shapes and dtypes that are the same on all ranks. A
            sum of floats is made in an order that depends on the world size alone.
        async_op: return before anything was sent: the messages travel while the caller is in `wait`.

    Collective. The signature is that of torch's collectives, as `ActivityTracker.start` calls it.
    """
    reduction = Reduction(sums, maxima, group)
    if not async_op:
        reduction.wait()
    return reduction


class Reduction:
    """One reduction, made by `wait`; stands in for the work handle of a torch collective."""

    def __init__(self, sums: Sequence[Tensor], maxima: Tensor, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self._tensors, self._num_sums = [*sums, maxima], len(sums)
        self._sizes = [tensor.nbytes for tensor in self._tensors]
        self._deadline: float | None = None
        self._is_done = False

    def wait(self, timeout: timedelta | None = None) -> None:
        """Exchange this rank's messages with its neighbours in the tree; afterwards the tensors hold the totals.

        Raises RuntimeError where a neighbour does not come in time or is gone.
        """
        self._deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        packed = torch.cat([tensor.flatten().view(torch.uint8) for tensor in self._tensors])
        parts = self._parts(packed)
        children, parent = _children_and_parent(self._rank, self._world_size)
        received = torch.empty_like(packed)
        for child in children:
            self._receive(received, child)
            for index, (mine, other) in enumerate(zip(parts, self._parts(received), strict=True)):
                mine.add_(other) if index < self._num_sums else torch.maximum(mine, other, out=mine)
        if parent is not None:
            self._finish([self._send(packed, parent)])
            self._receive(packed, parent)
        # The child with the largest subtree first, as it has the most hops still to make.
        self._finish([self._send(packed, child) for child in reversed(children)])
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        self._is_done = True

    def is_completed(self) -> bool:
        """True once `wait` has returned; before it nothing is sent."""
        return self._is_done

    def _parts(self, packed: Tensor) -> list[Tensor]:
        """Views of the tensors' elements in a packed message."""
        return [part.view(tensor.dtype) for part, tensor in zip(packed.split(self._sizes), self._tensors, strict=True)]

    def _send(self, packed: Tensor, rank: int) -> Any:
        return dist.isend(packed, group=self._group, group_dst=rank, tag=_TREE_TAG)

    def _receive(self, packed: Tensor, rank: int) -> None:
        self._finish([dist.irecv(packed, group=self._group, group_src=rank, tag=_TREE_TAG)])

    def _finish(self, works: Sequence[Any]) -> None:
        for work in works:
            if self._deadline is None:
                work.wait()
            else:
                work.wait(time_until(self._deadline))


def time_until(deadline: float) -> timedelta:
    """The time left until time.monotonic() is `deadline`; at least 1 ms, as torch takes a time-out of 0 as no limit."""
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _children_and_parent(rank: int, world_size: int) -> tuple[list[int], int | None]:
    """The children of a rank, the one with the smallest subtree first, and its parent; None for rank 0."""
    children, bit = [], 1
    while bit < world_size and not rank & bit:
        if rank + bit < world_size:
            children.append(rank + bit)
        bit <<= 1
    return children, rank - bit if rank else None
