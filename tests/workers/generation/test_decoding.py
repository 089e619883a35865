"""What a batch of sequences reads in each step, against reading every sequence again whole."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.workers.model.attention.test_cache import KINDS
from tests.workers.model.test_decoder import build
from tests.workers.training.test_gradients import form_groups
from workers.generation.decoding import DecodingBatch, DecodingSequence
from workers.generation.generate import SamplingConfig, generate
from workers.model.decoder import Decoder

CPU, EOD = torch.device("cpu"), 10
SEEDS = {"grouped_query": 0, "latent": 5}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4, 5], list(range(10)) * 2]


def _sequence(index: int, ids: list[int]) -> DecodingSequence:
    return DecodingSequence(index, list(ids), torch.Generator())


def _best(logits: Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


@torch.no_grad()
def _batched(model: Decoder, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], list[int]]:
    """New tokens of each prompt, and the tokens that each forward read."""
    sequences = [_sequence(index, ids) for index, ids in enumerate(prompts)]
    batch = DecodingBatch(sequences, max_new_tokens=max_new_tokens, max_seq_len=model.config.max_seq_len, eod_id=EOD)
    num_read = []
    while batch.running:
        inputs = batch.next_inputs(CPU)
        num_read.append(int(inputs["token_mask"].sum()))
        batch.append(_best(model(**inputs)))
    return [sequence.new_ids for sequence in sequences], num_read


@torch.no_grad()
def _one_by_one(model: Decoder, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The slow reference: no cache, no batch; what outgrows the model goes on from the last half."""
    limit, window, new_ids = model.config.max_seq_len, prompt[-model.config.max_seq_len :], []
    for _ in range(max_new_tokens):
        (token_id,) = _best(model(torch.tensor([window]))[:, -1])
        if token_id == EOD:
            break
        new_ids.append(token_id)
        window = [*window, token_id]
        window = window if len(window) <= limit else window[-(limit // 2) :]
    return new_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_continues_each_prompt_as_if_it_were_alone_and_beyond_max_seq_len(kind: str) -> None:
    model = build(seed=SEEDS[kind], **KINDS[kind]).double().eval()
    found, _ = _batched(model, PROMPTS, 30)  # max_seq_len is 16
    expected = [_one_by_one(model, prompt, 30) for prompt in PROMPTS]
    assert found == expected
    assert min(map(len, expected)) < 16 < max(map(len, expected)) == 30  # some end early, and leave the others


def test_each_step_reads_one_token_of_every_unfinished_sequence() -> None:
    model = build().eval()
    found, num_read = _batched(model, PROMPTS[:3], 5)
    assert min(map(len, found)) >= 5 - 1 or any(len(ids) < 5 for ids in found)
    assert num_read[0] == 3 + 1 + 10
    # A text of n tokens that did not end by itself was read n - 1 times after the prompt.
    assert num_read[1:] == [sum(len(ids) > step for ids in found) for step in range(len(num_read) - 1)]


def test_an_empty_batch_reads_nothing() -> None:
    inputs = DecodingBatch([], max_new_tokens=5, max_seq_len=16, eod_id=EOD).next_inputs(CPU)
    assert not inputs["token_mask"].any()
    assert build().eval()(**inputs).shape == (0, 11)


def test_a_sequence_ends_at_the_end_of_a_document_or_at_its_last_token() -> None:
    first, second, third = sequences = [_sequence(0, [1]), _sequence(1, [2, 3]), _sequence(2, [4])]
    batch = DecodingBatch(sequences, max_new_tokens=2, max_seq_len=16, eod_id=EOD)
    batch.next_inputs(CPU)
    batch.append([5, EOD, 6])
    assert batch.running == [first, third]
    inputs = batch.next_inputs(CPU)
    assert inputs["token_ids"].tolist() == [[5], [6]]
    assert inputs["positions"].tolist() == [[1], [1]]
    batch.append([EOD, 7])
    assert batch.running == []
    assert [sequence.new_ids for sequence in (first, second, third)] == [[5], [], [6, 7]]


def _sampled(rank: int, world_size: int, seed: int) -> list[int]:
    sampling = SamplingConfig(max_new_tokens=4, temperature=1.0, seed=seed)
    groups = form_groups(rank, world_size, 1)
    return generate(build(), PROMPTS[:1], sampling, groups, eod_id=EOD, autocast=nullcontext()).new_ids[0]


@pytest.mark.parametrize("seed", [-1, 2**62, 2**63 - 1])
def test_every_seed_that_a_run_may_have_samples(seed: int) -> None:
    (new_ids,) = run_ranks(1, _sampled, seed)
    assert new_ids


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_a_temperature_that_is_no_number_of_at_least_0_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and finite; 0 is greedy"):
        SamplingConfig(temperature=temperature)
