"""Every family generates what transformers' `generate` does, token for token, at EP 1, 2 and 4."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dispatch.balance import read_bias, read_counts, routers_of
from tests.ranks import run_ranks
from tests.workers.model.families.hugging_face import EOD_ID, NEW_TOKENS, PROMPTS, Reference
from tests.workers.model.families.test_parity import build, gangs
from workers.distributed.parallel import RankGroups
from workers.generation.generate import SamplingConfig, generate

Sampled = dict[str, dict[int, list[int]]]  # new ids by model and prompt


def _generate_all(rank: int, world_size: int, folder: Path) -> tuple[Sampled, Sampled]:
    """What this rank sampled alone, and as one of all."""
    by_gang = []
    for groups, files in gangs(rank, world_size, folder, "generation"):
        by_gang.append(
            {file.stem: _generate(*torch.load(file, weights_only=False), groups, file.stem) for file in files}
        )
    return by_gang[0], by_gang[1]


def _generate(expected: Reference, continued: list[list[int]], groups: RankGroups, name: str) -> dict[int, list[int]]:
    model = build(expected, groups)
    bias = read_bias(routers_of(model))
    mine = range(groups.rank, len(PROMPTS), groups.world_size)
    for batch_size in (1, 32) if groups.world_size == 1 else (32,):
        greedy = SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=batch_size)
        found = generate(model, PROMPTS, greedy, groups, eod_id=EOD_ID, autocast=nullcontext())
        assert found.new_ids == {index: continued[index] for index in mine}, name
        assert found.speed.prompt_tokens == sum(len(PROMPTS[index]) for index in mine)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5)
    sampled = generate(model, PROMPTS, sampling, groups, eod_id=EOD_ID, autocast=nullcontext()).new_ids
    assert not read_counts(routers_of(model)).any()
    assert torch.equal(read_bias(routers_of(model)), bias)
    return sampled


@pytest.mark.parametrize("ep_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_generation_equals_that_of_transformers_and_does_not_depend_on_the_ranks(
    ep_size: int, in_float64: Path
) -> None:
    by_rank = run_ranks(ep_size, _generate_all, in_float64)
    sampled_by_one = {name: texts for alone, _ in by_rank for name, texts in alone.items()}
    assert len(sampled_by_one) == len(list(in_float64.glob("*.pt")))
    for name, texts in sampled_by_one.items():
        assert {index: ids for _, together in by_rank for index, ids in together[name].items()} == texts
