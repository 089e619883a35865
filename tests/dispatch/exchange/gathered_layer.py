"""An expert-parallel layer that shares no code and no layout with ours, to show that the parity kit takes any.

Every rank sees all tokens and adds what its experts make of them; an expert is three nn.Linear with inputs first.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dispatch.parity.layers import LayerUnderTest


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        rows = rows.clone()
        dist.all_reduce(rows, group=group)
        return rows

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class GatheredLayer(nn.Module):
    """Sigmoid scores, weights normalised over the chosen, no groups, no shared experts; experts divide by ranks."""

    def __init__(self, hidden, ffn_hidden, num_experts, top_k, group):
        super().__init__()
        self.top_k, self.group, self.rank = top_k, group, dist.get_rank(group)
        num_local = num_experts // dist.get_world_size(group)
        self.first = self.rank * num_local
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(torch.empty(shape)) for shape in [(hidden, 2 * ffn_hidden), (ffn_hidden, hidden)]
            )
            for _ in range(num_local)
        )
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("counts", torch.zeros(num_experts))

    def forward(self, x):
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64)
        sizes[self.rank] = len(x)
        dist.all_reduce(sizes, group=self.group)
        first = int(sizes[: self.rank].sum())
        mine = slice(first, first + len(x))
        x = _SumOverRanks.apply(F.pad(x, (0, 0, first, int(sizes.sum()) - mine.stop)), self.group)
        scores = self.gate(x).sigmoid()
        chosen = torch.zeros_like(scores).scatter(1, (scores.float() + self.bias).topk(self.top_k).indices, 1.0)
        self.counts += chosen[mine].detach().sum(0)
        weights = scores * chosen / (scores * chosen).sum(1, keepdim=True)
        y = torch.zeros_like(x)
        for i, (gate_up, down) in enumerate(self.experts, start=self.first):
            gate, up = (x @ gate_up).chunk(2, dim=1)
            y = y + weights[:, i : i + 1] * ((F.silu(gate) * up) @ down)
        return _SumOverRanks.apply(y, self.group)[mine]


def build(case, weights, group):
    """The adapter."""
    layer = GatheredLayer(case.hidden, case.config.ffn_hidden, case.config.num_experts, case.config.top_k, group)
    layer.to(weights["expert_gate"].dtype)

    def read(pick):
        gate_up, down = (torch.stack([pick(pair[i]).t() for pair in layer.experts]) for i in range(2))
        gate, up = gate_up.chunk(2, dim=1)
        return {"router": pick(layer.gate.weight), "expert_gate": gate, "expert_up": up, "expert_down": down}

    with torch.no_grad():
        layer.gate.weight.copy_(weights["router"])
        for i, (gate_up, down) in enumerate(layer.experts, start=layer.first):
            gate_up.copy_(torch.cat([weights["expert_gate"][i], weights["expert_up"][i]]).t())
            down.copy_(weights["expert_down"][i].t())
    return LayerUnderTest(layer, read, list(layer.experts.parameters()), layer.bias, layer.counts)
