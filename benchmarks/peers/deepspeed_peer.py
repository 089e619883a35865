"""DeepSpeed: `MoE(drop_tokens=False)`, which pads every expert's tokens to the number of the busiest expert.

Users of DeepSpeed write the expert themselves; the one here has gate and up in one weight, the fastest usual form.
DeepSpeed always computes the auxiliary loss; it is not added to anything here.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, from_gate_up, gradient, stacked_gradient


class Expert(nn.Module):
    """SwiGLU with gate and up in one weight."""

    def __init__(self, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * ffn_hidden, bias=False)
        self.down = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The layer with its own groups for the same ranks."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at its import; it would look for accelerators otherwise
    import deepspeed
    from deepspeed.moe.layer import MoE

    # Else it would compile collectives over shared memory, which only its inference uses, and fail without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    shape, mine = setting.shape, weights.of_experts(setting.expert_ids)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    layer = MoE(
        shape.hidden,
        Expert(shape.hidden, shape.ffn_hidden),
        num_experts=shape.num_experts,
        ep_size=setting.ep_size,
        k=shape.top_k,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,  # the second expert by its score, not by chance
    ).to(setting.dtype)
    layer.set_deepspeed_parallelism()
    gate, experts = layer.deepspeed_moe.gate.wg, layer.deepspeed_moe.experts.deepspeed_experts
    gate.to(torch.float32).weight.data.copy_(mine.router_EH)
    for expert, gate_up, down in zip(experts, mine.gate_up(), mine.down_EHF, strict=True):
        expert.gate_up.weight.data.copy_(gate_up)
        expert.down.weight.data.copy_(down)
    return Contestant(lambda x_TH: layer(x_TH)[0], list(layer.parameters()), lambda: _read_grads(gate, experts))


def _read_grads(gate: nn.Linear, experts: nn.ModuleList) -> LayerWeights:
    gate_up = stacked_gradient([expert.gate_up.weight for expert in experts])
    down = stacked_gradient([expert.down.weight for expert in experts])
    return from_gate_up(gradient(gate.weight), gate_up, down)
