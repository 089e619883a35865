"""The experts of one rank as one stacked SwiGLU: two tensors, not L modules.

Shapes: Q arrived rows (may be 0), R expert rows, a copy for each of its experts (may be 0), H hidden, F ffn_hidden,
G = 2F, L local experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.dispatcher import DispatchHandle
from dispatch.looped_experts import LoopedSwiGLU
from dispatch.meter import Meter
from dispatch.recycler import Recycler
from dispatch.swiglu import WeightedSwiGLU
from dispatch.weight_grads import WeightGrads

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")

# All rows of a small batch stay in a core's cache: 16 experts of 32 rows, 256 wide, take 6.8 ms forward and backward
# together and 8.6 one after the other (one thread); 64 experts of 128 rows, 512 wide, 177 and 152.
SMALL_BYTES = 2 * 2**20


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one layer call in its compute dtype, shared by its chunks, and where their gradients gather."""

    gate_up_LGH: Tensor
    down_LHF: Tensor
    grads: WeightGrads


class Experts(nn.Module):
    """`expert_ids` of a layer: down(silu(gate(x)) * up(x) * row weight) on the rows of each expert.

    gate_up_proj is (L, 2F, H), the gate first, down_proj is (L, H, F), row i belonging to expert_ids[i]. The combine
    weight is applied on the inner activation, which is the same sum and spares keeping the outputs for backward.
    """

    def __init__(self, hidden: int, ffn_hidden: int, expert_ids: range, meter: Meter, recycler: Recycler) -> None:
        super().__init__()
        self.expert_ids, self.meter, self.recycler = expert_ids, meter, recycler
        num_local = len(expert_ids)
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * ffn_hidden, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, ffn_hidden))
        if not self.gate_up_proj.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in; needed after `to_empty`."""
        for name in EXPERT_WEIGHTS:
            weight = getattr(self, name)
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """What the chunks of one layer call share: the weights in `dtype`, cast once."""
        grads = WeightGrads(self.recycler)
        return ExpertWeights(*grads.share(self.gate_up_proj.to(dtype), self.down_proj.to(dtype)), grads)

    def forward(self, arrived_QH: Tensor, handle: DispatchHandle, weights: ExpertWeights | None = None) -> Tensor:
        """Apply each expert to its rows.

        Args:
            arrived_QH: what `dispatch` returned with the handle; its dtype is the compute dtype.
            weights: of this call, where it has several chunks.
        Returns:
            For each arrived row the sum of its experts' weighted outputs, (Q, H). An expert without rows gets zero
            gradients, not None.
        """
        weights = weights or self.weights(arrived_QH.dtype)
        with torch.autocast(arrived_QH.device.type, enabled=False), self.meter.span("experts", arrived_QH.device):
            if _group(arrived_QH, len(handle.sources_R), self.down_proj.shape[2]):
                return grouped_swiglu(arrived_QH, handle, weights.gate_up_LGH, weights.down_LHF, recycler=self.recycler)
            sums_QH: Tensor = LoopedSwiGLU.apply(
                arrived_QH,
                handle.row_weights_R,
                weights.gate_up_LGH,
                weights.down_LHF,
                handle.sources_R,
                tuple(handle.tokens_per_local_expert_L),
                weights.grads,
                self.meter,
            )
            return sums_QH


def _group(arrived_QH: Tensor, num_rows: int, ffn_hidden: int) -> bool:
    """Whether to compute all experts at once: on GPUs for few launches, on CPUs where copies of all rows are cheap."""
    row_bytes, inner_bytes = (size * arrived_QH.element_size() for size in (arrived_QH.shape[1], ffn_hidden))
    if row_bytes % 16 or inner_bytes % 16:  # a rule of torch's grouped matmul, for the strides of its matrices
        return False
    if arrived_QH.is_cuda:
        return arrived_QH.dtype == torch.bfloat16
    return arrived_QH.dtype in (torch.float32, torch.bfloat16) and num_rows * row_bytes <= SMALL_BYTES


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert weights of `model` by parameter name: the only parameters that differ between EP ranks."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(module, name)
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name in EXPERT_WEIGHTS
    }


def grouped_swiglu(
    arrived_QH: Tensor, handle: DispatchHandle, gate_up_LGH: Tensor, down_LHF: Tensor, *, recycler: Recycler
) -> Tensor:
    """The experts by torch's grouped matmul: one call a projection for all. bf16 or, on CPUs, fp32; Q, R may be 0."""
    counts_L = torch.tensor(handle.tokens_per_local_expert_L, dtype=torch.int32, pin_memory=arrived_QH.is_cuda)
    # From pinned memory, or the host could wait for the device.
    ends_L = counts_L.to(arrived_QH.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    rows_RH = handle.expert_rows.copy(arrived_QH)
    gate_up_RG = F.grouped_mm(rows_RH, gate_up_LGH.transpose(1, 2), offs=ends_L)
    inner_RF = WeightedSwiGLU.apply(gate_up_RG, handle.row_weights_R, recycler)
    return handle.expert_rows.sum(F.grouped_mm(inner_RF, down_LHF.transpose(1, 2), offs=ends_L))
