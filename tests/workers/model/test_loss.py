"""The chunked loss against whole logits: values, gradients, dtypes, and what it holds at once."""

import math

import pytest
import torch
from torch import Tensor

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from tests.workers.model.token_loss import token_nll, token_nll_sum
from workers.model.loss import after_next, linear_cross_entropy, logits_at_once

TOKENS, HIDDEN, VOCAB = 7, 5, 11


def inputs(*, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, tokens, HIDDEN, dtype=dtype, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, generator=generator)
    targets = torch.randint(VOCAB, (2, tokens), generator=generator)
    targets[0, :2] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("tokens", [0, TOKENS])
@pytest.mark.parametrize("chunk", [1, 3, 7, 14, 100])  # of 14 tokens
def test_any_chunk_gives_the_loss_and_the_gradients_of_whole_logits(chunk: int, tokens: int) -> None:
    x, weight, targets = inputs(tokens=tokens)
    loss = linear_cross_entropy(x, weight, targets, max_logits=chunk * VOCAB + VOCAB - 1)
    expected = token_nll(x @ weight.T, targets)
    torch.testing.assert_close(loss.of_token, expected.detach(), rtol=1e-13, atol=0)
    assert (loss.of_token.flatten()[:2] == 0).all()
    found = torch.autograd.grad(loss.total / 9, [x, weight])
    whole = torch.autograd.grad(expected.sum() / 9, [x, weight])
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_loss_is_the_negative_log_of_the_targets_probability() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]], dtype=torch.float64)
    loss = linear_cross_entropy(logits, torch.eye(2, dtype=torch.float64), torch.tensor([[0, 1]]))
    # probabilities of the targets: 1 / 4 and 1 / 5
    expected = torch.tensor([[math.log(4.0), math.log(5.0)]], dtype=torch.float64)
    torch.testing.assert_close(loss.of_token, expected, rtol=1e-14, atol=0)
    assert loss.total.item() == pytest.approx(math.log(20.0), rel=1e-14)


def test_a_large_logit_overflows_nothing_and_a_token_without_target_may_be_nan() -> None:
    x = torch.tensor([[1e4, 0.0], [math.nan, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, torch.eye(2), torch.tensor([1, -100]))
    assert loss.of_token.tolist() == [1e4, 0.0]
    loss.total.backward()
    assert x.grad is not None and x.grad[0].tolist() == [1.0, -1.0]


def test_what_is_frozen_gets_no_gradient_and_without_gradients_nothing_is_kept() -> None:
    x, weight, targets = inputs()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets).total.grad_fn is None
    linear_cross_entropy(x, weight.requires_grad_(False), targets).total.backward()
    assert x.grad is not None and weight.grad is None


def test_bf16_logits_are_summed_in_fp32_and_their_gradients_over_chunks_too() -> None:
    x, weight, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, max_logits=2 * VOCAB)
    assert loss.total.dtype == loss.of_token.dtype == torch.float32
    found = torch.autograd.grad(loss.total, [x, weight])
    with torch.autocast("cpu", torch.bfloat16):
        logits = x @ weight.T
    whole = torch.autograd.grad(token_nll_sum(logits.float(), targets), [x, weight])
    assert loss.total.item() == pytest.approx(token_nll_sum(logits.float(), targets).item(), rel=1e-6)
    for ours, theirs in zip(found, whole, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_second_backward_is_refused() -> None:
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets)
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_the_logits_never_exist_all_at_once() -> None:
    x = torch.randn(4096, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    targets = torch.randint(500, (4096,))
    whole_bytes = 4 * 4096 * 500

    def peak_bytes(num_chunks: int) -> int:
        chunk = 4096 * 500 // num_chunks

        def step() -> None:
            linear_cross_entropy(x, weight, targets, chunk).total.backward()

        return peak_allocated_bytes(step)

    assert peak_bytes(1) > whole_bytes > 4 * peak_bytes(16)


def test_the_bound_holds_for_any_vocabulary() -> None:
    assert logits_at_once(1000, 257) == 257_000
    assert logits_at_once(1 << 20, 151_936) == 883 * 151_936 < 1 << 27
    assert logits_at_once(5, 1 << 28) == 1 << 28  # a token at a time


def test_the_layer_for_the_token_after_next_has_no_target_at_the_end() -> None:
    assert after_next(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]
