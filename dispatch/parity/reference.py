"""The MoE layer written as plainly as possible: a slow loop over tokens, in one process.

Tests and parity checks compare all other implementations with it. Shapes: T tokens, H hidden, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatch.config import RouterConfig


def reference_choice(scores: list[float], bias: list[float], config: RouterConfig) -> list[int]:
    """The expert ids that one token chooses, best first; ties go to the lowest id."""
    # In fp32, in which the router compares: in float64 other scores would be equal.
    biased = (torch.tensor(scores, dtype=torch.float32) + torch.tensor(bias, dtype=torch.float32)).tolist()
    size = config.num_experts // config.num_groups
    allowed = list(range(config.num_experts))
    if config.num_groups > 1:
        members = [allowed[group * size : (group + 1) * size] for group in range(config.num_groups)]
        group_scores = [
            torch.tensor(sorted((biased[e] for e in group), reverse=True)[: config.scores_per_group]).sum().item()
            for group in members
        ]
        best = sorted(range(config.num_groups), key=lambda group: (-group_scores[group], group))
        allowed = [e for group in best[: config.groups_kept] for e in members[group]]
    return sorted(allowed, key=lambda e: (-biased[e], e))[: config.top_k]


def reference_moe(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    expert_bias_E: Tensor,
    gate_proj_EFH: Tensor,
    up_proj_EFH: Tensor,
    down_proj_EHF: Tensor,
    config: RouterConfig,
) -> tuple[Tensor, list[list[int]]]:
    """Routed experts only (no shared ones), all on this rank. Returns y_TH and the chosen ids of each token."""
    outputs, chosen = [], []
    for x_H in x_TH:
        logits_E = router_weight_EH @ x_H.to(router_weight_EH.dtype)
        sigmoid = config.score == "sigmoid"
        scores_E = logits_E.sigmoid() if sigmoid else logits_E.softmax(0)
        ids = reference_choice(scores_E.tolist(), expert_bias_E.tolist(), config)
        log_scores = torch.stack([F.logsigmoid(logits_E[e]) if sigmoid else logits_E.log_softmax(0)[e] for e in ids])
        weights = log_scores.softmax(0) if config.normalize_weights else log_scores.exp()
        y_H = torch.zeros_like(x_H)
        for weight, e in zip(weights * config.route_scale, ids, strict=True):
            inner = F.silu(gate_proj_EFH[e] @ x_H) * (up_proj_EFH[e] @ x_H)
            y_H = y_H + weight.to(x_H.dtype) * (down_proj_EHF[e] @ inner)
        outputs.append(y_H)
        chosen.append(ids)
    return torch.stack(outputs) if outputs else x_TH.clone(), chosen
