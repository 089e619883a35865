"""The cases that are compared, with their initial weights and batches, all drawn from one seed.

Shapes: T tokens of this rank (may be 0), E experts, H hidden, F ffn_hidden, S width of the shared experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dispatch.config import MoEConfig
from dispatch.parity.workloads import WORKLOADS, Workload, tokens_that_choose

NUM_EXPERTS = 8  # of every case: 3, 5, 6 and 7 ranks do not divide it, so that ranks hold unequal numbers of experts


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer, and how its tokens are drawn.

    moe: settings that differ from the default layer. bias: pairs of an expert and its bias, which force where tokens
    go. tokens: how many tokens each of four ranks has. Fewer ranks take the last numbers, more ranks repeat them, and a
    single rank takes their sum. workload: one of `dispatch.parity.workloads`, at `step`, instead of `tokens`;
    its tokens are drawn so that they choose the experts of the workload.
    """

    name: str
    hidden: int = 6
    moe: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    bias: tuple[tuple[int, float], ...] = ()
    tokens: tuple[int, int, int, int] = (5, 9, 2, 7)
    workload: str | None = None
    step: int = 0

    @property
    def config(self) -> MoEConfig:
        """The layer's configuration."""
        defaults = {"num_experts": NUM_EXPERTS, "top_k": 2, "ffn_hidden": 5, "num_shared_experts": 0}
        return MoEConfig(**(defaults | dict(self.moe)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class CaseInputs:
    """Inputs of one rank, x_TH, and the gradient of its outputs, grad_output_TH; both float64 on the CPU."""

    x_TH: Tensor
    grad_output_TH: Tensor


def _workload_case(name: str, step: int) -> Case:
    return Case(
        name=f"{name}-{WORKLOADS[name].replace(' ', '-')}",
        hidden=NUM_EXPERTS + 1,
        moe={"top_k": 3},
        workload=name,
        step=step,
    )


CASES: tuple[Case, ...] = (
    Case(name="plain"),
    Case(name="top-1", moe={"top_k": 1}),
    Case(name="top-8-of-8", moe={"top_k": 8}),
    Case(name="shared-experts-and-scale", moe={"num_shared_experts": 2, "route_scale": 2.5}),
    Case(name="softmax-not-normalised", moe={"score": "softmax", "normalize_weights": False}),
    Case(name="groups", moe={"num_groups": 4, "groups_kept": 2, "top_k": 3}),
    Case(name="rank-without-tokens", tokens=(5, 0, 4, 0)),
    Case(name="one-rank-has-all-tokens", tokens=(0, 0, 0, 6)),
    # Scores lie in [0, 1]: a bias of 50 decides every choice.
    Case(name="expert-without-tokens", bias=((3, -50.0),)),
    Case(name="all-to-one-expert", moe={"top_k": 1}, bias=((5, 50.0),)),
    Case(name="all-to-first-rank", bias=((0, 50.0), (1, 50.0))),
    # Widths that are multiples of 16 bytes in every dtype, as torch's grouped matmul wants. No other case has such.
    Case(name="aligned-widths", hidden=16, moe={"top_k": 3, "ffn_hidden": 8}),
    *(_workload_case(name, step=7) for name in WORKLOADS),  # the step in which W7 bursts
)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's weights: experts stacked by global id, all matrices (out, in)."""
    config, hidden = case.config, case.hidden
    experts, ffn, shared = config.num_experts, config.ffn_hidden, config.ffn_hidden * config.num_shared_experts
    shared_shapes = {"shared_gate": (shared, hidden), "shared_up": (shared, hidden), "shared_down": (hidden, shared)}
    return {
        "router": (experts, hidden),
        "expert_gate": (experts, ffn, hidden),
        "expert_up": (experts, ffn, hidden),
        "expert_down": (experts, hidden, ffn),
        **(shared_shapes if shared else {}),
    }


def is_expert_weight(name: str) -> bool:
    """Whether a rank holds only its own experts' part of this weight."""
    return name.startswith("expert_")


def draw_weights(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Normal weights of variance 1 / fan-in, on the CPU: the router at least in fp32, the others in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(case).items():
        name_dtype = torch.promote_types(dtype, torch.float32) if name == "router" else dtype
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = (drawn / math.sqrt(shape[-1])).to(name_dtype)
    return weights


def draw_batches(case: Case, ep_size: int, weights: Mapping[str, Tensor], seed: int) -> list[CaseInputs]:
    """The batch of every rank; together they are the global batch. All values are exact in the dtype of the experts."""
    dtype, batches = weights["expert_gate"].dtype, []
    workload = _workload(case, ep_size, seed)
    counts = workload.tokens_of_ranks() if workload else _tokens_by_rank(case.tokens, ep_size)
    for rank, num_tokens in enumerate(counts):
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + rank)
        x_TH, grad_output_TH = torch.randn(2, num_tokens, case.hidden, generator=generator, dtype=torch.float64)
        if workload:
            ids_TK = workload.route(rank, case.step)
            x_TH = tokens_that_choose(ids_TK, weights["router"].double(), seed=1000 * seed + rank)
        batches.append(CaseInputs(x_TH.to(dtype).double(), grad_output_TH.to(dtype).double()))
    return batches


def _tokens_by_rank(tokens: tuple[int, ...], ep_size: int) -> list[int]:
    """The numbers of `Case.tokens` for this many ranks."""
    return list((tokens * ep_size)[-ep_size:]) if ep_size > 1 else [sum(tokens)]


def _workload(case: Case, ep_size: int, seed: int) -> Workload | None:
    if case.workload is None:
        return None
    config = case.config
    return Workload(
        name=case.workload,
        num_experts=config.num_experts,
        top_k=config.top_k,
        ep_size=ep_size,
        num_tokens=6,
        seed=seed,
    )
