"""The router: scores, choice, combine weights and the count of what was chosen.

Shapes: T tokens on this rank (may be 0), H hidden, E experts, K top-k.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.config import RouterConfig
from dispatch.diagnosis.activity_tracker import in_backward
from dispatch.routing.precision import KeepsWide
from dispatch.routing.selection import CountInBackward, biased_scores, count_by_expert, ordered_topk
from dispatch.routing.statistics import RouterChoice, Statistic

# (logits_TE, topk_ids_TK, token_mask_T, num_sequences): called in each training forward that has gradients enabled.
Observer = Callable[[Tensor, Tensor, Tensor | None, int], None]


class Router(KeepsWide):
    """Scores every expert for every token, chooses top-k by score + bias and weighs by score alone.

    The gate runs in fp32 (float64 in a float64 model), whatever the dtype of the activations or the autocast, since
    rounding to bf16 changes which experts are chosen. `expert_bias_E` is a persistent fp32 buffer that only
    `dispatch.balance.write_state` changes, once per optimizer step. `tokens_per_expert_E` counts the choices of
    training forwards since the last reset, `statistic_EW` the law's statistic (`dispatch.balance.attach_law`).
    `on_scores` is called with the fp32 scores (T, E) of every training forward, but not of recomputes.
    Source: arXiv 2412.19437, equations 12 to 16.
    """

    at_least_fp32 = ("weight", "gate_bias")
    always_fp32 = ("expert_bias_E", "statistic_scale")
    expert_bias_E: Tensor
    tokens_per_expert_E: Tensor
    statistic_EW: Tensor
    statistic_scale: Tensor

    def __init__(self, hidden: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden))
        self.gate_bias = nn.Parameter(torch.empty(config.num_experts)) if config.gate_bias else None
        self.register_buffer("expert_bias_E", torch.zeros(config.num_experts, dtype=torch.float32))
        # Not persistent: checkpoints are saved between steps, when all counts are zero.
        self.register_buffer(
            "tokens_per_expert_E", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False
        )
        self.register_buffer("statistic_EW", torch.zeros(config.num_experts, 0, dtype=torch.int64), persistent=False)
        # Not persistent: it is a copy out of the law's state, which checkpoints hold.
        self.register_buffer("statistic_scale", torch.zeros((), dtype=torch.float32), persistent=False)
        self.statistic: Statistic | None = None
        self.observer: Observer | None = None  # set by workers.training.aux_losses where an auxiliary loss is on
        self.multiplies_bias = False
        self.on_scores: Callable[[Tensor], None] | None = None
        self._bias_version_of_forward = -1
        if not self.weight.is_meta:  # a model built on the meta device draws its weights after `to_empty`
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate from a normal distribution and zero biases and counts; needed after `to_empty`."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.gate_bias is not None:
            nn.init.zeros_(self.gate_bias)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Zero bias, counts and the law's statistic; `to_empty` leaves them uninitialised."""
        for buffer in self.buffers():
            buffer.zero_()

    def attach(self, statistic: Statistic | None, *, multiplies_bias: bool) -> None:
        """Set what to count beside the load, None for nothing. multiplies_bias: choose by score * (1 + bias)."""
        self.statistic, self.multiplies_bias = statistic, multiplies_bias
        self.statistic_EW = self.tokens_per_expert_E.new_zeros(self.num_experts, statistic.width if statistic else 0)

    @property
    def steers_bias(self) -> bool:
        """Whether a law may move the bias: not in a frozen router (Megatron-LM #4785)."""
        return self.weight.requires_grad

    def logits(self, x_TH: Tensor) -> Tensor:
        """The outputs of the gate, (T, E), in the gate's dtype."""
        return F.linear(x_TH.to(self.weight.dtype), self.weight, self.gate_bias)

    def forward(
        self, x_TH: Tensor, token_mask_T: Tensor | None = None, num_sequences: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Route each token.

        Args:
            x_TH: any float dtype.
            token_mask_T: bool, False for padding, which is routed but not counted.
            num_sequences: the tokens are this many sequences of equal length; only an auxiliary loss needs it.
        Returns:
            topk_ids_TK int64, best first, and topk_weights_TK in the gate's dtype: fp32, in a float64 model float64.
        """
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = self.logits(x_TH)
            with torch.no_grad():  # choosing has no gradient; the weights get theirs in `weigh`, from the logits
                scores_TE = logits_TE.sigmoid() if self.config.score == "sigmoid" else logits_TE.softmax(-1)
            bias_E, multiplies = self.expert_bias_E, self.multiplies_bias
            biased_TE = biased_scores(scores_TE, bias_E, multiplies=multiplies, **self.config.groups)
            topk_ids_TK = ordered_topk(biased_TE, self.config.top_k)
            topk_weights_TK = self.weigh(logits_TE, topk_ids_TK)
            if self.observer is not None and self.training and torch.is_grad_enabled():
                self.observer(logits_TE, topk_ids_TK, token_mask_T, num_sequences)
        if self.training:
            routing = RouterChoice(scores_TE.float(), biased_TE, topk_ids_TK, self.expert_bias_E, self.statistic_scale)
            if self.on_scores is not None and not in_backward():
                self.on_scores(routing.scores_TE)
            topk_weights_TK = self._count(routing, topk_weights_TK, token_mask_T)
        return topk_ids_TK, topk_weights_TK

    def weigh(self, logits_TE: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """The combine weights of chosen experts, which depend on the logits alone, never on the bias."""
        softmax = self.config.score == "softmax"
        if self.config.normalize_weights:
            # s_i / sum(s), computed as a softmax of log s: where scores underflow, the quotient itself would be 0/0, or
            # with an epsilon in the divisor the weights would sum to less than 1 (flashinfer #3803).
            logits_TK = logits_TE.gather(1, topk_ids_TK)
            weights_TK = (logits_TK if softmax else F.logsigmoid(logits_TK)).softmax(-1)
        else:
            weights_TK = (logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()).gather(1, topk_ids_TK)
        return weights_TK * self.config.route_scale

    def _count(self, routing: RouterChoice, topk_weights_TK: Tensor, token_mask_T: Tensor | None) -> Tensor:
        """Count each choice of a training forward exactly once, under either kind of activation recompute.

        Returns the combine weights, in a recompute with the count tied to their backward:

        - Without recompute the forward has gradients, and counts at once.
        - Non-reentrant recompute: the forward has gradients and counts. It is repeated inside backward only for its
          saved tensors; the backward of the repetition never runs, so its count does not either.
        - Reentrant recompute: the forward has no gradients and counts nothing. It is repeated inside backward, and the
          backward of the repetition does run, so that it counts.
        """
        recompute, bias_version = in_backward(), self.expert_bias_E._version  # noqa: SLF001 - torch's own count of writes
        if not recompute:
            self._bias_version_of_forward = bias_version
        elif bias_version != self._bias_version_of_forward:
            raise RuntimeError(
                "expert_bias_E changed between a forward and its recompute, so backward would use other experts; "
                "move the bias only after all backward passes of the step"
            )
        if not torch.is_grad_enabled():
            return topk_weights_TK
        with torch.no_grad():
            mask_TK = None if token_mask_T is None else token_mask_T.unsqueeze(1).expand_as(routing.topk_ids_TK)
            counts = [(self.tokens_per_expert_E, count_by_expert(routing.topk_ids_TK, self.num_experts, mask_TK))]
            if self.statistic is not None:
                counts.append((self.statistic_EW, self.statistic.count(routing, token_mask_T)))
        if recompute:
            topk_weights_TK = CountInBackward.apply(topk_weights_TK, counts)
            return topk_weights_TK
        for total, count in counts:
            total.add_(count)
        return topk_weights_TK
