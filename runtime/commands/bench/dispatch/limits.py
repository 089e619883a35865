"""Lower bounds of a step of an MoE layer: its matmuls alone, and its all-to-alls alone.

Shapes: T tokens of a rank, H hidden, F ffn_hidden, L local experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.diagnosis.meter import Message


@dataclass(frozen=True)
class Shape:
    """Sizes of an MoE layer. tokens: of each rank. num_experts: of all ranks."""

    tokens: int
    hidden: int
    ffn_hidden: int
    num_experts: int
    top_k: int

    def rows_per_expert(self, world_size: int) -> int:
        """Rows that an expert gets under a balanced load."""
        return self.tokens * self.top_k * world_size // self.num_experts


def matmul_flops(num_rows: int, hidden: int, ffn_hidden: int) -> int:
    """Floating-point operations of the six matmuls of `num_rows` expert rows, gate and up being one."""
    # Forward 2·H·2F and 2·F·H a row; backward twice that, for the gradients of rows and of weights.
    return 18 * num_rows * hidden * ffn_hidden


def matmul_limit(
    shape: Shape, num_local: int, world_size: int, dtype: torch.dtype, device: torch.device | None = None
) -> Callable[[Tensor], None]:
    """The six matmuls of every local expert on balanced rows that lie in order, results preallocated."""
    per_expert, hidden, inner = shape.rows_per_expert(world_size), shape.hidden, shape.ffn_hidden

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(num_local, *sizes, dtype=dtype, device=device)

    x, grad_y, y, grad_x = (tensor(per_expert, hidden) for _ in range(4))
    gate_up, grad_gate_up = (tensor(per_expert, 2 * inner) for _ in range(2))
    act, grad_act = (tensor(per_expert, inner) for _ in range(2))
    up_proj, grad_up_proj = (tensor(2 * inner, hidden) for _ in range(2))
    down_proj, grad_down_proj = (tensor(hidden, inner) for _ in range(2))
    forward = [(x, up_proj.mT, gate_up), (act, down_proj.mT, y)]
    backward = [
        (grad_y, down_proj, grad_act),
        (grad_y.mT, act, grad_down_proj),
        (grad_gate_up, up_proj, grad_x),
        (grad_gate_up.mT, x, grad_up_proj),
    ]

    def run(_x: Tensor) -> None:
        for matmuls in (forward, backward):
            if x.is_cuda:  # one launch for all experts: a loop over small ones would be bound by the host
                for left, right, out in matmuls:
                    torch.bmm(left, right, out=out)
                continue
            for e in range(num_local):
                for left, right, out in matmuls:
                    torch.mm(left[e], right[e], out=out[e])

    return run


@dataclass
class BareExchange:
    """Repeats the all-to-alls of a step alone: the same ranks and bytes, from buffers that exist already."""

    device: torch.device
    _messages: Sequence[Message] = ()
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self, messages: Sequence[Message]) -> None:
        """Remember the messages that a meter noted in a step, and allocate buffers for the largest of them."""
        self._messages = messages
        self._grow("send", max((each.row_bytes * sum(each.input_splits) for each in messages), default=0))
        self._grow("receive", max((each.row_bytes * sum(each.output_splits) for each in messages), default=0))

    @property
    def sent_bytes(self) -> int:
        """Bytes that one `run` sends to other ranks."""
        return sum(each.row_bytes * sum(each.input_splits) for each in self._messages)

    def run(self) -> None:
        """Repeat all exchanges, one after the other. Collective."""
        send, receive = self._buffers["send"], self._buffers["receive"]
        for each in self._messages:
            outgoing, incoming = (
                [rows * each.row_bytes for rows in splits] for splits in (each.input_splits, each.output_splits)
            )
            dist.all_to_all_single(
                receive[: sum(incoming)], send[: sum(outgoing)], incoming, outgoing, group=each.group
            )

    def _grow(self, name: str, num_bytes: int) -> None:
        if name not in self._buffers or len(self._buffers[name]) < num_bytes:
            # A quarter more, as sizes differ by step. Not torch.zeros, which on CPUs leaves pages to be mapped on first
            # use: that would be timed.
            self._buffers[name] = torch.empty(num_bytes * 5 // 4, dtype=torch.uint8, device=self.device).zero_()
