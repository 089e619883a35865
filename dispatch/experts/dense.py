"""The feed-forward that every token passes: dense layers, and the shared experts of an MoE layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Dense feed-forward down(silu(gate(x)) * up(x)), for dense layers and shared experts; returns the shape of x.

    token_gate: multiply each token's output by sigmoid(g · x), with a learned vector g (Qwen2-MoE).
    """

    def __init__(self, hidden: int, ffn_hidden: int, token_gate: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn_hidden, bias=False)
        self.up_proj = nn.Linear(hidden, ffn_hidden, bias=False)
        self.down_proj = nn.Linear(ffn_hidden, hidden, bias=False)
        self.token_gate = nn.Linear(hidden, 1, bias=False) if token_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype rules as nn.Linear."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y if self.token_gate is None else y * self.token_gate(x).sigmoid()
