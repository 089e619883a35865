"""The experts of a rank by plain autograd, one after the other: what every path of them is compared with."""

import torch
import torch.nn.functional as F


def plain_experts(counts, sources, arrived, weights, gate_up, down):
    """The sums of the weighted outputs of the arrived rows, of which expert rows are copies by `sources`."""
    sums, start = torch.zeros_like(arrived), 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        gate, up = (arrived[sources[rows]] @ gate_up[expert].t()).chunk(2, 1)
        out = (F.silu(gate) * up * weights[rows, None]) @ down[expert].t()
        sums, start = sums.index_add(0, sources[rows], out), start + count
    return sums
