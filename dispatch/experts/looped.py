"""The experts of one rank, one after the other: the path of CPUs, and of dtypes without a grouped matmul.

Shapes: Q arrived rows (may be 0), R expert rows, a copy of an arrived row for each of its experts (may be 0), H hidden,
F ffn_hidden, G = 2F (the gate first), L local experts, n rows of one expert.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.experts.weight_grads import WeightGrads

# oneDNN (bf16) compiles a kernel for each new shape, and the rows of an expert change in every step. They are padded to
# a multiple of this number, or of a larger one where there are many, so that few shapes occur. AMX tiles are 16 rows
# high. MKL (fp32, fp64) compiles nothing, so that other dtypes need no padding.
BF16_ROWS = 16

# Most rows of an expert that are computed at once: it bounds the scratch memory that a hot expert takes.
MAX_RUN = 2048


@dataclass(frozen=True)
class ExpertRows:
    """The rows of all experts, in order of expert, those of each expert padded.

    sources_R: the arrived row that each row is a copy of. weights_R: its combine weight. A padding row is arrived row 0
    with weight 0, which adds exactly 0 to outputs and gradients, so that no code has to tell it from the others.
    real_rows: int64, the positions of the rows that are not padding; None without padding. runs: pairs of an expert and
    the slice of its rows; more than MAX_RUN rows are cut into several runs.
    """

    sources_R: Tensor
    weights_R: Tensor
    real_rows: Tensor | None
    runs: list[tuple[int, slice]]

    @classmethod
    def padded(cls, sources_R: Tensor, weights_R: Tensor, counts_L: tuple[int, ...], multiple: int) -> "ExpertRows":
        """Pad the rows of all experts, `counts_L` of each, in order. multiple: pad to multiples of it; 1 for none."""
        sizes = [_padded(count, multiple) for count in counts_L]
        starts = [0, *itertools.accumulate(sizes)]
        runs = [
            (expert, slice(first, min(first + MAX_RUN, start + size)))
            for expert, (start, size) in enumerate(zip(starts, sizes, strict=False))
            for first in range(start, start + size, MAX_RUN)
        ]
        if starts[-1] == len(sources_R):
            return cls(sources_R, weights_R, None, runs)
        # Each real row moves by the padding of the experts before its own.
        shift_L = torch.tensor(starts[:-1]) - torch.tensor([0, *itertools.accumulate(counts_L)][:-1])
        shift_R = shift_L.repeat_interleave(torch.tensor(counts_L)).to(sources_R.device)
        real_rows = torch.arange(len(sources_R), device=sources_R.device) + shift_R
        sources, weights = (
            part.new_zeros(starts[-1]).index_copy_(0, real_rows, part) for part in (sources_R, weights_R)
        )
        return cls(sources, weights, real_rows, runs)

    @property
    def longest(self) -> int:
        """Rows of the longest run."""
        return max((run.stop - run.start for _, run in self.runs), default=0)

    def unpad(self, values_R: Tensor) -> Tensor:
        """The values of the rows that are not padding."""
        return values_R if self.real_rows is None else values_R.index_select(0, self.real_rows)


def _padded(count: int, multiple: int) -> int:
    """The next multiple, or the next sixteenth of the power of two below `count`: above 256 rows at most 6 % more."""
    step = multiple if multiple == 1 else max(multiple, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


@dataclass(frozen=True)
class _Sums:
    """Sums of expert rows by arrived row. Each expert adds its rows when it is done, so that they are never all kept.

    sums_QH: fp32 where rows are bf16: at top-8, eight additions rounded to bf16 would cost three bits of the sum.
    out_nH: scratch memory for the rows of one expert.
    """

    sums_QH: Tensor
    out_nH: Tensor
    sources_R: Tensor

    @classmethod
    def zero(cls, rows: ExpertRows, arrived_QH: Tensor, buffer_pool: BufferPool) -> "_Sums":
        wide = torch.promote_types(arrived_QH.dtype, torch.float32)
        return cls(
            buffer_pool.zeros(*arrived_QH.shape, like=arrived_QH, dtype=wide),
            buffer_pool.empty(rows.longest, arrived_QH.shape[1], like=arrived_QH),
            rows.sources_R,
        )

    def add_product(self, run: slice, left: Tensor, right: Tensor) -> None:
        """Add left @ right, the rows of this run of an expert, to their sums."""
        out = torch.mm(left, right, out=self.out_nH[: run.stop - run.start])
        # A token chooses an expert once, so no two rows of one call add to one sum: results do not depend on threads.
        self.sums_QH.index_add_(0, self.sources_R[run], out.to(self.sums_QH.dtype))

    def total(self) -> Tensor:
        """The sums in the dtype of the rows, (Q, H)."""
        return self.sums_QH.to(self.out_nH.dtype)


class LoopedSwiGLU(torch.autograd.Function):
    """down(silu(gate) * up * weight) of every expert on its rows, summed per arrived row: (Q, H).

    Each expert gathers its rows from those that arrived and adds its outputs to their sums, in backward too: no tensor
    has a copy of a row for each of its experts. Elementwise work follows the matmul at once, while its rows are in
    cache. Only gate and up are kept for backward, which recomputes the rest of the inner activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        arrived_QH: Tensor,
        row_weights_R: Tensor,
        gate_up_LGH: Tensor,
        down_LHF: Tensor,
        sources_R: Tensor,
        counts_L: tuple[int, ...],
        grads: WeightGrads,
        meter: Meter,
    ) -> Tensor:
        buffer_pool, (_, num_hidden, num_inner) = grads.buffer_pool, down_LHF.shape
        multiple = BF16_ROWS if arrived_QH.dtype == torch.bfloat16 and arrived_QH.device.type == "cpu" else 1
        # The weights in the dtype of the rows: elementwise work on mixed dtypes would copy each operand first.
        rows = ExpertRows.padded(sources_R, row_weights_R.to(arrived_QH.dtype), counts_L, multiple)
        gate_up_RG = buffer_pool.empty(len(rows.sources_R), 2 * num_inner, like=arrived_QH)
        x_nH, inner_nF = (buffer_pool.empty(rows.longest, size, like=arrived_QH) for size in (num_hidden, num_inner))
        sums = _Sums.zero(rows, arrived_QH, buffer_pool)
        for expert, run in rows.runs:
            size, sources = run.stop - run.start, rows.sources_R[run]
            x, inner = x_nH[:size], inner_nF[:size]
            torch.index_select(arrived_QH, 0, sources, out=x)
            torch.mm(x, gate_up_LGH[expert].t(), out=gate_up_RG[run])
            weighted_swiglu(gate_up_RG[run], rows.weights_R[run], out=inner)
            sums.add_product(run, inner, down_LHF[expert].t())
        ctx.save_for_backward(arrived_QH, rows.sources_R, rows.weights_R, gate_up_RG, gate_up_LGH, down_LHF)
        ctx.rows, ctx.grads, ctx.meter = (rows.real_rows, rows.runs), grads, meter
        ctx.weight_dtype = row_weights_R.dtype
        return sums.total()

    @staticmethod
    def backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.span("experts", grad_sums_QH.device):
            # None for the expert weights: `WeightGrads` sums their gradients over all chunks and returns them once.
            return *_backward(ctx, grad_sums_QH), *[None] * 6


def _backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of arrived rows and of row weights. Those of expert weights, unless frozen, go to ctx.grads."""
    arrived_QH, sources_R, weights_R, gate_up_RG, gate_up_LGH, down_LHF = ctx.saved_tensors
    rows, grads, frozen = ExpertRows(sources_R, weights_R, *ctx.rows), ctx.grads, not ctx.needs_input_grad[2]
    grad_weights_R = torch.empty_like(weights_R, dtype=ctx.weight_dtype)
    buffer_pool, (_, num_hidden, num_inner) = grads.buffer_pool, down_LHF.shape
    x_nH, grad_out_nH, grad_gate_up_nG, inner_nF, grad_inner_nF = (
        buffer_pool.empty(rows.longest, size, like=arrived_QH)
        for size in (num_hidden, num_hidden, 2 * num_inner, num_inner, num_inner)
    )
    scratch_2nF = buffer_pool.empty(2, rows.longest, num_inner, like=arrived_QH)
    sums = _Sums.zero(rows, arrived_QH, buffer_pool)
    for expert, run in rows.runs:
        size, sources = run.stop - run.start, rows.sources_R[run]
        x, grad_out, grad_gate_up = x_nH[:size], grad_out_nH[:size], grad_gate_up_nG[:size]
        inner, grad_inner = inner_nF[:size], grad_inner_nF[:size]
        torch.index_select(grad_sums_QH, 0, sources, out=grad_out)
        torch.mm(grad_out, down_LHF[expert], out=grad_inner)
        weighted_swiglu_backward(
            gate_up_RG[run],
            rows.weights_R[run],
            grad_inner,
            inner,
            grad_gate_up,
            grad_weights_R[run],
            scratch_2nF[:, :size],
        )
        if not frozen:
            grads.add(1, expert, grad_out.t(), inner, (gate_up_LGH, down_LHF))
            torch.index_select(arrived_QH, 0, sources, out=x)
            grads.add(0, expert, grad_gate_up.t(), x, (gate_up_LGH, down_LHF))
        sums.add_product(run, grad_gate_up, gate_up_LGH[expert])
    return sums.total(), rows.unpad(grad_weights_R)


def weighted_swiglu(gate_up_nG: Tensor, weights_n: Tensor, *, out: Tensor) -> Tensor:
    """Write silu(gate) * up * weight into `out` (n, F). weights_n: in the dtype of the rows, else torch copies them."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate_nF, out=out)
    return out.mul_(up_nF).mul_(weights_n.unsqueeze(1))


def weighted_swiglu_backward(
    gate_up_nG: Tensor,
    weights_n: Tensor,
    grad_inner_nF: Tensor,
    inner_nF: Tensor,
    grad_gate_up_nG: Tensor,
    grad_weights_n: Tensor,
    scratch_2nF: Tensor,
) -> None:
    """The backward of `weighted_swiglu`: writes inner and both gradients into given tensors, overwrites grad_inner_nF.

    With inner = silu(g) u w, its gradient P and s = sigmoid(g):  dL/dw = sum(P silu(g) u),  dL/du = P silu(g) w,
    dL/dg = P u w silu'(g),  silu'(g) = s + silu(g) (1 - s). No other memory is taken, and each tensor is passed once.
    """
    (gate, up), (grad_gate, grad_up) = gate_up_nG.chunk(2, dim=1), grad_gate_up_nG.chunk(2, dim=1)
    (sigmoid, silu), weights_n1 = scratch_2nF, weights_n.unsqueeze(1)
    torch.sigmoid(gate, out=sigmoid)
    torch.mul(gate, sigmoid, out=silu)
    weighted = torch.mul(up, weights_n1, out=grad_gate)
    torch.mul(silu, weighted, out=inner_nF)
    torch.lerp(sigmoid, sigmoid.new_ones(1, 1), silu, out=sigmoid)  # silu'(g)
    grad_gate.mul_(sigmoid).mul_(grad_inner_nF)
    # P silu(g): times w it is dL/du, times u and summed dL/dw.
    grad_inner_nF.mul_(silu)
    torch.mul(grad_inner_nF, weights_n1, out=grad_up)
    torch.sum(grad_inner_nF.mul_(up), 1, out=grad_weights_n, dtype=grad_weights_n.dtype)
