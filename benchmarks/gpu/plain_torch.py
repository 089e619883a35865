"""The MoE layer as a skilled user of torch writes it: sort, index, grouped matmuls, SwiGLU, weighted sum.

Shapes: T tokens, K top-k, E experts, H hidden, F ffn_hidden, R = T x K expert rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, from_gate_up, gradient, parameter


class PlainLayer(nn.Module):
    """One process, a gate in fp32."""

    def __init__(self, weights: LayerWeights, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k = top_k
        self.router_EH = parameter(weights.router_EH, torch.float32)
        self.gate_up_EGH = parameter(weights.gate_up(), dtype)
        self.down_EHF = parameter(weights.down_EHF, dtype)

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) to (T, H)."""
        weights_TK, ids_TK = F.linear(x_TH.float(), self.router_EH).softmax(-1).topk(self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        ids_R = ids_TK.flatten()
        order_R = ids_R.argsort(stable=True)
        token_R = order_R // self.top_k
        counts_E = torch.zeros(len(self.router_EH), dtype=torch.int32, device=x_TH.device)
        ends_E = counts_E.scatter_add(0, ids_R, torch.ones_like(ids_R, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        gate_RF, up_RF = F.grouped_mm(x_TH[token_R], self.gate_up_EGH.transpose(1, 2), offs=ends_E).chunk(2, 1)
        inner_RF = F.silu(gate_RF) * up_RF * weights_TK.flatten()[order_R, None].to(x_TH.dtype)
        y_RH = F.grouped_mm(inner_RF, self.down_EHF.transpose(1, 2), offs=ends_E)
        return torch.zeros_like(x_TH).index_add(0, token_R, y_RH)


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The layer of one process."""
    layer = PlainLayer(weights, setting.shape.top_k, setting.dtype)

    def read_grads() -> LayerWeights:
        return from_gate_up(*(gradient(weight) for weight in (layer.router_EH, layer.gate_up_EGH, layer.down_EHF)))

    return Contestant(layer, list(layer.parameters()), read_grads)
