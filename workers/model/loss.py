"""The loss of a language model: the negative log likelihood of each next token.

Shapes: T tokens, C tokens of a chunk, H hidden, V vocabulary; B sequences, S tokens of a sequence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the logits that exist at once: 512 MiB in fp32. With smaller chunks the gradient of a large head would be
# added to more often; larger chunks make no matmul faster.
MAX_LOGITS = 1 << 27


class TokenLoss(NamedTuple):
    """Losses in nats, at least fp32. total: their sum, a scalar with gradient. of_token: of each token, detached."""

    total: Tensor
    of_token: Tensor


def linear_cross_entropy(x: Tensor, weight_VH: Tensor, targets: Tensor, max_logits: int = MAX_LOGITS) -> TokenLoss:
    """Cross entropy of the logits `x @ weight_VH.T`, of which at most `max_logits` elements exist at once.

    The gradients are computed in forward, while the logits of a chunk exist, so that no matmul is done twice. Computes
    in the dtype of autocast as F.linear does; the softmax and the sum over chunks are at least fp32. (torch has a
    function of this name since 2.13, not in 2.11; it sums over chunks in the dtype of the logits.)

    Args:
        x: float (..., H), after the last norm.
        weight_VH: the output projection.
        targets: int64 (...), -100 for a token without loss.

    Returns losses shaped like targets, 0 where a target is -100, and their sum. Divide the sum by the number of targets
    of the global batch before backward: gradients are then summed over micro-batches and ranks without further scaling.
    """
    # Known only before `apply`: inside the forward of a torch.autograd.Function gradients are always off.
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight_VH.requires_grad)
    chunk = _chunk(len(weight_VH), max_logits)
    total, of_token_T = _LinearCrossEntropy.apply(x.flatten(0, -2), weight_VH, targets.flatten(), chunk, with_gradients)
    return TokenLoss(total, of_token_T.view_as(targets))


def logits_at_once(num_tokens: int, vocab_size: int) -> int:
    """How many elements of the logits exist at once while the loss of `num_tokens` tokens is computed."""
    return min(num_tokens, _chunk(vocab_size, MAX_LOGITS)) * vocab_size


def after_next(targets: Tensor) -> Tensor:
    """Targets of the MTP layer, from those of the decoder (B, S): shifted by one token; the last is unknown, -100."""
    return F.pad(targets[:, 1:], (0, 1), value=-100)


def _chunk(vocab_size: int, max_logits: int) -> int:
    """The number of tokens whose logits exist at once."""
    return max(1, max_logits // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk: int, with_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        needs_x, needs_weight = (needed and with_gradients for needed in ctx.needs_input_grad[:2])
        grad_VH = torch.zeros_like(weight_VH) if needs_weight else None
        losses: list[Tensor] = []
        grads_of_x: list[Tensor] = []
        for x_CH, targets_C in zip(x_TH.split(chunk), targets_T.split(chunk), strict=True):
            logits_CV = F.linear(x_CH, weight_VH)
            dtype = logits_CV.dtype
            logits_CV = logits_CV.to(torch.promote_types(dtype, torch.float32))
            losses.append(_cross_entropy_(logits_CV, targets_C))
            grad_CV = logits_CV.to(dtype)
            if needs_x:
                grads_of_x.append(grad_CV @ weight_VH)
            if grad_VH is not None:
                grad_VH += grad_CV.T @ x_CH
        loss_T = torch.cat(losses)
        ctx.save_for_backward(torch.cat(grads_of_x) if needs_x else None, grad_VH)
        ctx.mark_non_differentiable(loss_T)
        return loss_T.sum(), loss_T

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the head's gradient is one of the largest tensors. It cannot be scaled twice: torch refuses a
        # second backward once saved tensors are freed.
        grad_TH, grad_VH = (None if each is None else each.mul_(grad) for each in ctx.saved_tensors)
        return grad_TH, grad_VH, None, None, None


def _cross_entropy_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the loss of each token, and put its gradient in place of the logits."""
    has_target_C = targets_C >= 0
    index_C1 = targets_C.clamp(min=0).unsqueeze(1)
    logits_CV -= logits_CV.amax(1, keepdim=True)
    chosen_C = logits_CV.gather(1, index_C1).squeeze(1)
    sums_C = logits_CV.exp_().sum(1)
    logits_CV *= (has_target_C / sums_C).unsqueeze(1)
    logits_CV.scatter_add_(1, index_C1, -has_target_C.to(logits_CV.dtype).unsqueeze(1))
    return torch.where(has_target_C, sums_C.log() - chosen_C, 0.0)
