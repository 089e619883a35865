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

# oneDNN builds a kernel for each new shape in bf16, and rows per expert change every step: they are filled up to a
# multiple of this, or of more where there are many, so that there are few shapes. AMX tiles are 16 rows high. MKL
# (fp32, fp64) has no such cost.
BF16_ROWS = 16

# Rows of an expert that are computed at once: a hot expert takes no more scratch memory than this.
MAX_RUN = 2048


@dataclass(frozen=True)
class ExpertRows:
    """Where the rows of each expert lie, the number of each filled up to one of few.

    sources_R: the arrived row that each is a copy of. weights_R: its combine weight. What fills up is arrived row 0
    with weight 0, so that it adds exactly nothing to outputs and gradients and needs no case of its own.
    places: of the real rows, int64; None where nothing was filled up. runs: expert and slice, long ones cut.
    """

    sources_R: Tensor
    weights_R: Tensor
    places: Tensor | None
    runs: list[tuple[int, slice]]

    @classmethod
    def of(cls, sources_R: Tensor, weights_R: Tensor, counts_L: tuple[int, ...], granule: int) -> "ExpertRows":
        """From the rows of all experts in order, `counts_L` of each. granule: 1 to fill up nothing."""
        sizes = [_filled_up(count, granule) for count in counts_L]
        starts = [0, *itertools.accumulate(sizes)]
        runs = [
            (expert, slice(first, min(first + MAX_RUN, start + size)))
            for expert, (start, size) in enumerate(zip(starts, sizes, strict=False))
            for first in range(start, start + size, MAX_RUN)
        ]
        if starts[-1] == len(sources_R):
            return cls(sources_R, weights_R, None, runs)
        shift = torch.tensor(starts[:-1]) - torch.tensor([0, *itertools.accumulate(counts_L)][:-1])
        shift_R = shift.repeat_interleave(torch.tensor(counts_L)).to(sources_R.device)
        places = torch.arange(len(sources_R), device=sources_R.device) + shift_R
        sources, weights = (part.new_zeros(starts[-1]).index_copy_(0, places, part) for part in (sources_R, weights_R))
        return cls(sources, weights, places, runs)

    @property
    def longest(self) -> int:
        """Rows of the longest run."""
        return max((run.stop - run.start for _, run in self.runs), default=0)

    def unfill(self, values_R: Tensor) -> Tensor:
        """The values of the real rows."""
        return values_R if self.places is None else values_R.index_select(0, self.places)


def _filled_up(count: int, granule: int) -> int:
    """The next multiple of the granule, or of a sixteenth of its power of two: at most 6 % more above 256 rows."""
    step = granule if granule == 1 else max(granule, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


@dataclass(frozen=True)
class _Sums:
    """Sums of expert rows by arrived row, added to as each expert is done: no tensor holds a row once per expert.

    sums_QH: fp32 for bf16 rows, of which eight roundings in a row would cost three bits. out_nH: rows of one expert.
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
        """Add the rows left @ right of the expert that has this run."""
        out = torch.mm(left, right, out=self.out_nH[: run.stop - run.start])
        # A token chooses an expert once, so no two rows of one call add to the same sum: the order is fixed.
        self.sums_QH.index_add_(0, self.sources_R[run], out.to(self.sums_QH.dtype))

    def total(self) -> Tensor:
        """The sums in the dtype of the rows, (Q, H)."""
        return self.sums_QH.to(self.out_nH.dtype)


class LoopedSwiGLU(torch.autograd.Function):
    """down(silu(gate) * up * weight) of every expert on its rows, summed per arrived row: (Q, H).

    An expert gathers its rows from those that arrived and adds its outputs to their sums, so that no tensor holds a row
    once per expert; in backward the same. Its elementwise work follows its matmul while its rows are in cache. Of the
    inner activations only gate and up are kept; the rest is recomputed.
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
        granule = BF16_ROWS if arrived_QH.dtype == torch.bfloat16 and arrived_QH.device.type == "cpu" else 1
        # In the dtype of the rows: elementwise work on mixed dtypes would copy each operand first.
        rows = ExpertRows.of(sources_R, row_weights_R.to(arrived_QH.dtype), counts_L, granule)
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
        ctx.rows, ctx.grads, ctx.meter = (rows.places, rows.runs), grads, meter
        ctx.weight_dtype = row_weights_R.dtype
        return sums.total()

    @staticmethod
    def backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.meter.span("experts", grad_sums_QH.device):
            # None for the weights: their gradients are in ctx.grads, over all chunks of the layer.
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
    return sums.total(), rows.unfill(grad_weights_R)


def weighted_swiglu(gate_up_nG: Tensor, weights_n: Tensor, *, out: Tensor) -> Tensor:
    """Write silu(gate) * up * weight into `out` (n, F). weights_n: in the dtype of the rows, else those are copied."""
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
    """From the gradient P of inner, which it overwrites, those of gate and up and of the weights; and inner once more.

    With inner = silu(g) u w and s = sigmoid(g):  dL/dw = sum(P silu(g) u),  dL/du = P silu(g) w,
    dL/dg = P u w silu'(g),  silu'(g) = s + silu(g) (1 - s).
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
