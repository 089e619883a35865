"""Auxiliary losses of routers, for comparison with balancing by bias: all off by default. See docs/token-path.md.

A balance loss looks at units of tokens: a sequence, a micro-batch or the global batch. In unit u with n_u tokens,
expert i has the frequency f_ui = E c_ui / sum_j c_uj, where c_ui tokens chose it, and the mean probability
P_ui = mean_t s_ti / sum_j s_tj, where s is the router's score. The loss of a layer over a batch of n tokens is

    sum_u n_u / n  sum_i f_ui P_ui,

1 where experts are chosen evenly. No gradient passes through f, so that n_u P_ui, a sum over tokens, is the only part
whose graph must be kept from the forward. Frequencies are divided by the sum of the same counts, never by the tokens of
another micro-batch (Megatron-LM #7197). Padding is left out of counts, probabilities and z-loss.

Shapes: T tokens of this rank (may be 0), E experts, K top-k, U units (may be 0), N experts of all layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.balance import routers_of
from dispatch.diagnosis.activity_tracker import ActivityTracker, in_backward
from dispatch.errors import InvalidValue
from dispatch.routing.router import Router
from dispatch.routing.selection import count_by_expert, ordered_topk


@dataclass(frozen=True, kw_only=True)
class AuxLossConfig:
    """Losses on the router beside that of the language model, to compare balancing by bias with; all off."""

    loss: Literal["none", "switch", "global_batch", "sequence"] = "none"
    """Asks for even load within each micro-batch of a rank (switch, arXiv 2101.03961), within the batch of all ranks
    (global_batch, 2501.11873), or within each sequence (sequence, DeepSeek-V3, 2412.19437, equations 17 to 20)."""
    alpha: float = 1e-3
    """Factor on that loss, in each layer (1e-4 for sequence in DeepSeek-V3). 0 measures it and changes nothing."""
    z_alpha: float = 0.0
    """Factor on the z-loss, the mean square of the logsumexp of the router's logits (ST-MoE, 2202.08906); 0: off."""

    def __post_init__(self) -> None:
        if self.loss not in ("none", "switch", "global_batch", "sequence"):
            raise InvalidValue(f"aux.loss is {self.loss!r:.60}; it must be none, switch, global_batch or sequence")
        for name in ("alpha", "z_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidValue(f"aux.{name} ({value}) must be a finite number, at least 0")

    @property
    def balances(self) -> bool:
        """Whether there is a balance loss."""
        return self.loss != "none"

    @property
    def active(self) -> bool:
        """Whether there is any auxiliary loss."""
        return self.balances or self.z_alpha > 0


def probabilities(logits_TE: Tensor, score: Literal["sigmoid", "softmax"]) -> Tensor:
    """s_ti / sum_j s_tj, (T, E), as a softmax of log s.

    A quotient would need an epsilon against 0/0, and a router that shrinks all its scores below that epsilon would
    escape the loss (OLMo-core #255).
    """
    return (F.logsigmoid(logits_TE) if score == "sigmoid" else logits_TE).softmax(-1)


def sums_by_unit(probs_TE: Tensor, counted_T: Tensor | None, num_units: int) -> Tensor:
    """n_u P_ui, (U, E): probabilities summed over the counted tokens of each unit.

    Units are equal runs of tokens; counted_T: bool, None for all.
    """
    if counted_T is not None:
        probs_TE = probs_TE.masked_fill(~counted_T.unsqueeze(1), 0.0)
    sums_UE: Tensor = probs_TE.unflatten(0, (num_units, _unit_length(len(probs_TE), num_units))).sum(1)
    return sums_UE


def counts_by_unit(topk_ids_TK: Tensor, num_experts: int, counted_T: Tensor | None, num_units: int) -> Tensor:
    """c_ui, int64 (U, E): how many counted tokens of each unit chose each expert."""
    length = _unit_length(len(topk_ids_TK), num_units)
    unit_T = torch.arange(num_units, device=topk_ids_TK.device).repeat_interleave(length)
    counted_TK = None if counted_T is None else counted_T.unsqueeze(1).expand_as(topk_ids_TK)
    cells_TK = topk_ids_TK + unit_T.unsqueeze(1) * num_experts
    return count_by_expert(cells_TK, num_units * num_experts, counted_TK).view(num_units, num_experts)


def frequencies(counts_UE: Tensor) -> Tensor:
    """f_ui = E c_ui / sum_j c_uj, float64 (U, E): 1 where load is even, 0 in a unit without tokens."""
    return counts_UE.double() * counts_UE.shape[-1] / counts_UE.sum(-1, keepdim=True).clamp_min(1)


def balance_loss_sum(counts_UE: Tensor, sums_UE: Tensor) -> Tensor:
    """sum_u n_u sum_i f_ui P_ui, a scalar: divide it by the tokens of the global batch."""
    return (frequencies(counts_UE).to(sums_UE.dtype) * sums_UE).sum()


def z_loss_sum(logits_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    """The sum over tokens of logsumexp(logits)^2, a scalar: divide it by the tokens of the global batch.

    It is of the logits also where the score is a sigmoid, which it keeps away from saturation at either end.
    """
    squares_T = logits_TE.logsumexp(-1).square()
    return (squares_T if counted_T is None else squares_T.masked_fill(~counted_T, 0.0)).sum()


@dataclass(frozen=True)
class RouterTerms:
    """What the losses need of one forward of a router: counts_UE, sums_UE (U = 0 without balance loss), z_sum."""

    counts_UE: Tensor
    sums_UE: Tensor
    z_sum: Tensor


@dataclass
class RouterObserver:
    """Collects the terms of one router, for `Router.observer`."""

    config: AuxLossConfig
    router: Router
    taken: list[RouterTerms] = field(default_factory=list)

    def __call__(self, logits_TE: Tensor, topk_ids_TK: Tensor, token_mask_T: Tensor | None, num_sequences: int) -> None:
        """Collect the terms of one forward with gradients."""
        terms = self._terms(logits_TE, topk_ids_TK, token_mask_T, num_sequences)
        # Activation recompute, in backward, must compute the terms too, as torch compares the tensors that it saves
        # with those that the forward saved. The loss takes only the terms of the forward.
        if not in_backward():
            self.taken.append(terms)

    def _terms(
        self, logits_TE: Tensor, topk_ids_TK: Tensor, token_mask_T: Tensor | None, num_sequences: int
    ) -> RouterTerms:
        routing, num_experts = self.router.config, logits_TE.shape[1]
        counts_UE = sums_UE = logits_TE.new_zeros(0, num_experts)
        if self.config.balances:
            per_sequence = self.config.loss == "sequence"
            num_units = num_sequences if per_sequence else 1
            probs_TE = probabilities(logits_TE, routing.score)
            if per_sequence:
                # Equation 18 counts the choice by score alone, over all experts, not the one by bias and groups.
                with torch.no_grad():
                    topk_ids_TK = ordered_topk(logits_TE.detach(), routing.top_k)
            sums_UE = sums_by_unit(probs_TE, token_mask_T, num_units)
            counts_UE = counts_by_unit(topk_ids_TK, num_experts, token_mask_T, num_units)
        with_z = self.config.z_alpha > 0
        z_sum = z_loss_sum(logits_TE, token_mask_T) if with_z else logits_TE.new_zeros(())
        return RouterTerms(counts_UE, sums_UE, z_sum)


class AuxLosses:
    """The auxiliary losses of all routers of a model that train; frozen routers have none.

    Call `begin_step` before the first forward of an optimizer step and `take` after each forward that trains, on every
    rank of `group` together; `tracker` starts its collectives. `group=None` means this process alone. Works under
    non-reentrant activation recompute.

    What each loss is, exactly:
    - switch: units are the micro-batches of a rank, so it depends by definition on how the batch is divided.
    - sequence, z-loss: means over sequences, weighted by their tokens, and over tokens. Any layout gives the same.
    - global_batch: the unit is the global batch, whose counts are known only after its last forward, when the graphs of
      the other micro-batches are gone. As in its paper, a micro-batch uses what all ranks counted in the step so far,
      itself included. With one micro-batch a rank that is the whole batch, in any layout of ranks; with several, the
      last one sees the whole batch, and the order of the earlier ones matters.

    An expert's count is of the tokens that were routed to it, by score + bias; only `sequence` counts what score alone
    would choose.

    sums: balance loss and z-loss of the step so far without their factors, float64 (2,), summed over this rank's tokens
    and averaged over layers.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AuxLossConfig,
        group: dist.ProcessGroup | None = None,
        tracker: ActivityTracker | None = None,
    ) -> None:
        self.config, self.group, self._tracker = config, group, tracker or ActivityTracker()
        routers: Mapping[str, Router] = routers_of(model)
        learning = [name for name, router in routers.items() if router.steers_bias and config.active]
        self._observers = {name: RouterObserver(config, routers[name]) for name in learning}
        for name, observer in self._observers.items():
            routers[name].observer = observer
        self.begin_step()

    def begin_step(self) -> None:
        """Clear what was collected."""
        self._counts_N: Tensor | None = None  # of the step so far, over all ranks; for global_batch
        self.sums = torch.zeros(2, dtype=torch.float64)
        for observer in self._observers.values():
            observer.taken.clear()

    def take(self) -> Tensor:
        """The weighted losses of the last forward, summed over this rank's tokens and over layers: a scalar.

        Add it to the summed loss of the language model, and divide both by the tokens of the global batch.

        Collective over `group`: one all-reduce of the counts where the loss is global_batch.

        Raises:
            RuntimeError: there was no forward with gradients since the last call.
        """
        layers = [_take_terms(name, observer) for name, observer in self._observers.items()]
        if not layers:
            return torch.zeros(())
        counts = [layer.counts_UE for layer in layers]
        if self.config.loss == "global_batch":
            counts = self._counts_of_step(counts)
        balance = torch.stack(
            [balance_loss_sum(each, layer.sums_UE) for each, layer in zip(counts, layers, strict=True)]
        ).sum()
        z = torch.stack([layer.z_sum for layer in layers]).sum()
        self.sums = self.sums.to(z.device) + torch.stack([balance, z]).detach() / len(layers)
        return self.config.alpha * balance + self.config.z_alpha * z

    def _counts_of_step(self, counts: Sequence[Tensor]) -> list[Tensor]:
        counts_N = torch.cat([each.sum(0) for each in counts])
        if self.group is not None:
            self._tracker.run(dist.all_reduce, counts_N, group=self.group)
        self._counts_N = counts_N if self._counts_N is None else self._counts_N + counts_N
        return [each.unsqueeze(0) for each in self._counts_N.split([each.shape[1] for each in counts])]


def _take_terms(name: str, observer: RouterObserver) -> RouterTerms:
    """Empty the observer; returns the terms of all its forwards as those of one."""
    if not observer.taken:
        raise RuntimeError(
            f"{name} has had no forward with gradients since the last take(): call it once after each forward that "
            "trains, and use non-reentrant activation recompute, whose forward has gradients"
        )
    taken = observer.taken[:]
    observer.taken.clear()
    return RouterTerms(
        torch.cat([each.counts_UE for each in taken]),
        torch.cat([each.sums_UE for each in taken]),
        torch.stack([each.z_sum for each in taken]).sum(),
    )


def _unit_length(num_tokens: int, num_units: int) -> int:
    return num_tokens // max(num_units, 1)  # no units: no tokens
