"""The layer as a plain loop over experts in fp32, and the errors of a contestant against it.

All contestants route alike: softmax over all experts, top-k, weights divided by their sum. Every peer can be configured
so. No auxiliary loss reaches a gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, gradient

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The largest relative error (in the 2-norm, for each tensor) with which a layer may race."""


@dataclass(frozen=True)
class Answer:
    """The right results of a step on this rank; the router's gradient is that of the tokens of all ranks."""

    y_TH: Tensor
    dx_TH: Tensor
    grads: LayerWeights


@dataclass(frozen=True)
class Problem:
    """Tokens and cotangent of this rank, and the answer."""

    x_TH: Tensor
    grad_output_TH: Tensor
    answer: Answer


def pose(setting: Setting, weights: LayerWeights, x_TH: Tensor, grad_output_TH: Tensor) -> Problem:
    """Compute the answer for the tokens of all ranks, and keep this rank's part. Collective."""
    num_tokens, rank = len(x_TH), setting.ep_rank
    mine = slice(rank * num_tokens, (rank + 1) * num_tokens)
    whole = solve(weights, _all_ranks(x_TH.detach(), setting), _all_ranks(grad_output_TH, setting), setting.shape.top_k)
    answer = Answer(whole.y_TH[mine], whole.dx_TH[mine], whole.grads.of_experts(setting.expert_ids))
    return Problem(x_TH, grad_output_TH, answer)


def solve(weights: LayerWeights, x_TH: Tensor, grad_output_TH: Tensor, top_k: int) -> Answer:
    """Forward and backward of all tokens and all experts, in fp32."""
    leaves = LayerWeights(*(weight.clone().requires_grad_() for _, weight in weights.named()))
    x_TH = x_TH.float().requires_grad_()
    y_TH = _forward(leaves, x_TH, top_k)
    y_TH.backward(grad_output_TH.float())
    return Answer(y_TH.detach(), gradient(x_TH), LayerWeights(*(gradient(leaf) for _, leaf in leaves.named())))


def errors_of(contestant: Contestant, problem: Problem, setting: Setting) -> dict[str, float]:
    """Relative error of the output, of dx and of each weight's gradient. Collective."""
    contestant.reset()
    x_TH = problem.x_TH.detach().requires_grad_()
    y_TH = contestant.step(x_TH, problem.grad_output_TH)
    grads = contestant.read_grads()
    router_EH = grads.router_EH.float()
    if setting.ep_size > 1:
        dist.all_reduce(router_EH, group=setting.ep_group)
    found = {"y": y_TH, "dx": gradient(x_TH), **dict(grads.named()), "router": router_EH}
    wanted = {"y": problem.answer.y_TH, "dx": problem.answer.dx_TH, **dict(problem.answer.grads.named())}
    contestant.reset()
    return {name: _relative_error(found[name].float(), wanted[name]) for name in wanted}


def refusal(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """Why a layer with these errors may not race; None if it may."""
    # Not `error > limit`: that would let NaN pass.
    wrong = {name: error for name, error in errors.items() if not error <= MAX_ERROR[dtype]}
    if not wrong:
        return None
    listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
    return f"wrong results: relative error of {listed}, allowed {MAX_ERROR[dtype]:.0e}"


def _forward(weights: LayerWeights, x_TH: Tensor, top_k: int) -> Tensor:
    scores_TE = F.linear(x_TH, weights.router_EH).softmax(-1)
    best_TK, ids_TK = scores_TE.topk(top_k)
    weights_TK = best_TK / best_TK.sum(-1, keepdim=True)
    y_TH = torch.zeros_like(x_TH)
    experts = zip(weights.gate_EFH.unbind(), weights.up_EFH.unbind(), weights.down_EHF.unbind(), strict=True)
    for expert_id, (gate, up, down) in enumerate(experts):
        token, slot = (ids_TK == expert_id).nonzero(as_tuple=True)
        rows = x_TH[token]
        out = (F.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
        y_TH = y_TH.index_add(0, token, out * weights_TK[token, slot, None])
    return y_TH


def _all_ranks(rows_TH: Tensor, setting: Setting) -> Tensor:
    if setting.ep_size == 1:
        # Not even a collective of one rank. Gloo's thread would get a team of OpenMP threads of its own; with more such
        # threads than cores libgomp puts idle ones to sleep at once, and a step with two threads takes 480 ms, not 300.
        return rows_TH
    parts = [torch.empty_like(rows_TH) for _ in range(setting.ep_size)]
    dist.all_gather(parts, rows_TH, group=setting.ep_group)
    return torch.cat(parts)


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ValueError(f"a result has shape {tuple(found.shape)}, the oracle's has {tuple(wanted.shape)}")
    return float((found - wanted).norm() / wanted.norm())
