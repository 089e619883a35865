"""The experts of one rank, one after the other: the path of CPUs, and of dtypes without a grouped matmul.

Shapes: Q arrived rows (may be 0), R expert rows, a copy of an arrived row for each of its experts (may be 0), H hidden,
F ffn_hidden, G = 2F, L local experts, n rows of one expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch.meter import Meter
from dispatch.recycler import Recycler
from dispatch.weight_grads import WeightGrads

# oneDNN builds a kernel for each new shape in bf16, and rows per expert change every step: with a multiple of this
# there are few shapes. AMX tiles are 16 rows high. MKL (fp32, fp64) has no such cost.
BF16_ROWS = 16


@dataclass(frozen=True)
class ExpertRows:
    """Where the rows of each expert lie, each expert's run filled up to a multiple of `granule`.

    sources_R: the arrived row that each is a copy of. weights_R: its combine weight. What fills up is arrived row 0
    with weight 0, so that it adds exactly nothing to outputs and gradients and needs no case of its own.
    places: of the real rows, int64; None where nothing was filled up. runs: expert and its slice, where it has rows.
    """

    sources_R: Tensor
    weights_R: Tensor
    places: Tensor | None
    runs: list[tuple[int, slice]]

    @classmethod
    def of(cls, sources_R: Tensor, weights_R: Tensor, counts_L: tuple[int, ...], granule: int) -> "ExpertRows":
        """From the rows of all experts in order, `counts_L` of each."""
        runs, start, gaps = [], 0, []
        for expert, count in enumerate(counts_L):
            size = -(-count // granule) * granule
            gaps += [start - sum(counts_L[:expert])] if count else []
            runs += [(expert, slice(start, start + size))] if count else []
            start += size
        if start == len(sources_R):
            return cls(sources_R, weights_R, None, runs)
        lengths = torch.tensor([count for count in counts_L if count])
        shift = torch.tensor(gaps).repeat_interleave(lengths).to(sources_R.device)
        places = torch.arange(len(sources_R), device=sources_R.device) + shift
        sources, weights = (part.new_zeros(start).index_copy_(0, places, part) for part in (sources_R, weights_R))
        return cls(sources, weights, places, runs)

    @property
    def longest(self) -> int:
        """Rows of the longest run."""
        return max((run.stop - run.start for _, run in self.runs), default=0)

    def unfill(self, values_R: Tensor) -> Tensor:
        """The values of the real rows."""
        return values_R if self.places is None else values_R.index_select(0, self.places)


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
        recycler, (_, num_hidden, num_inner) = grads.recycler, down_LHF.shape
        granule = BF16_ROWS if arrived_QH.dtype == torch.bfloat16 and arrived_QH.device.type == "cpu" else 1
        rows = ExpertRows.of(sources_R, row_weights_R, counts_L, granule)
        gate_up_RG = recycler.empty(len(rows.sources_R), 2 * num_inner, like=arrived_QH)
        x_nH, inner_nF, out_nH = (
            recycler.empty(rows.longest, size, like=arrived_QH) for size in (num_hidden, num_inner, num_hidden)
        )
        sums_QH = _zero_sums(arrived_QH, recycler)
        for expert, run in rows.runs:
            size, sources = run.stop - run.start, rows.sources_R[run]
            x, inner, out, gate_up = x_nH[:size], inner_nF[:size], out_nH[:size], gate_up_RG[run]
            torch.index_select(arrived_QH, 0, sources, out=x)
            torch.mm(x, gate_up_LGH[expert].t(), out=gate_up)
            torch.ops.aten.silu.out(gate_up[:, :num_inner], out=inner)
            inner.mul_(gate_up[:, num_inner:]).mul_(rows.weights_R[run, None])
            torch.mm(inner, down_LHF[expert].t(), out=out)
            # A token chooses an expert once, so no two rows of one call add to the same sum: the order is fixed.
            sums_QH.index_add_(0, sources, out.to(sums_QH.dtype))
        ctx.save_for_backward(arrived_QH, rows.sources_R, rows.weights_R, gate_up_RG, gate_up_LGH, down_LHF)
        ctx.rows, ctx.grads, ctx.meter = (rows.places, rows.runs), grads, meter
        return sums_QH.to(arrived_QH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_sums_QH: Tensor) -> tuple[Tensor | None, ...]:
        arrived_QH, sources_R, weights_R, gate_up_RG, gate_up_LGH, down_LHF = ctx.saved_tensors
        rows = ExpertRows(sources_R, weights_R, *ctx.rows)
        grad_weights_R = torch.empty_like(weights_R)
        with ctx.meter.span("experts", grad_sums_QH.device):
            grad_arrived_QH = _backward(
                rows, arrived_QH, grad_sums_QH, gate_up_RG, gate_up_LGH, down_LHF, grad_weights_R, ctx.grads
            )
        # None for the weights: their gradients are in ctx.grads, over all chunks of the layer.
        return grad_arrived_QH.to(arrived_QH.dtype), rows.unfill(grad_weights_R), *[None] * 6


def _backward(
    rows: ExpertRows,
    arrived_QH: Tensor,
    grad_sums_QH: Tensor,
    gate_up_RG: Tensor,
    gate_up_LGH: Tensor,
    down_LHF: Tensor,
    grad_weights_R: Tensor,
    grads: WeightGrads,
) -> Tensor:
    """The gradient of the arrived rows; those of row weights and expert weights go into the last two arguments.

    With o = (silu(g) * u * w) D, P = dL/do D^T, s = sigmoid(g):  dL/dw = sum(P silu u),  dL/du = P silu w,
    dL/dg = P u w silu'(g),  silu'(g) = s + silu(g) (1 - s).
    """
    recycler, (_, num_hidden, num_inner) = grads.recycler, down_LHF.shape
    like, one = arrived_QH, arrived_QH.new_ones(1, 1)
    x_nH, grad_out_nH = (recycler.empty(rows.longest, num_hidden, like=like) for _ in range(2))
    grad_gate_up_nG = recycler.empty(rows.longest, 2 * num_inner, like=like)
    sigmoid_nF, silu_nF, weighted_nF, grad_inner_nF = (
        recycler.empty(rows.longest, num_inner, like=like) for _ in range(4)
    )
    grad_arrived_QH = _zero_sums(arrived_QH, recycler)
    for expert, run in rows.runs:
        size, sources = run.stop - run.start, rows.sources_R[run]
        gate, up = gate_up_RG[run, :num_inner], gate_up_RG[run, num_inner:]
        x, grad_out, grad_gate_up = x_nH[:size], grad_out_nH[:size], grad_gate_up_nG[:size]
        sigmoid, silu, weighted, grad_inner = (
            part[:size] for part in (sigmoid_nF, silu_nF, weighted_nF, grad_inner_nF)
        )
        weight_n1 = rows.weights_R[run, None]
        torch.index_select(grad_sums_QH, 0, sources, out=grad_out)
        torch.mm(grad_out, down_LHF[expert], out=grad_inner)
        torch.sigmoid(gate, out=sigmoid)
        torch.mul(gate, sigmoid, out=silu)
        torch.mul(up, weight_n1, out=weighted)
        inner = torch.mul(silu, weighted, out=grad_gate_up[:, :num_inner])
        grads.add(1, expert, grad_out.t(), inner, (gate_up_LGH, down_LHF))
        torch.mul(grad_inner, weighted, out=weighted)
        grad_inner.mul_(silu)
        torch.lerp(sigmoid, one, silu, out=silu)
        torch.mul(weighted, silu, out=grad_gate_up[:, :num_inner])
        torch.mul(grad_inner, weight_n1, out=grad_gate_up[:, num_inner:])
        torch.sum(grad_inner.mul_(up), 1, out=grad_weights_R[run], dtype=grad_weights_R.dtype)
        torch.index_select(arrived_QH, 0, sources, out=x)
        grads.add(0, expert, grad_gate_up.t(), x, (gate_up_LGH, down_LHF))
        grad_x = torch.mm(grad_gate_up, gate_up_LGH[expert], out=grad_out)
        grad_arrived_QH.index_add_(0, sources, grad_x.to(grad_arrived_QH.dtype))
    return grad_arrived_QH


def _zero_sums(rows: Tensor, recycler: Recycler) -> Tensor:
    # bf16 rows are summed in fp32: eight roundings in a row would cost three bits.
    return recycler.zeros(*rows.shape, like=rows, dtype=torch.promote_types(rows.dtype, torch.float32))
