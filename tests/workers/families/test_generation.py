"""Every family generates what transformers' `generate` does, token for token, at EP 1, 2 and 4."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dispatch.balance import read_bias, read_counts, routers_of
from tests.ranks import run_ranks
from tests.workers.families.hugging_face import CONFIGS, VOCAB_SIZE, Batch, Reference, Widened, make_model, reference
from tests.workers.families.test_parity import CPU, build
from workers.generation import SamplingConfig, generate
from workers.parallel import ParallelConfig, join_groups

EOD_ID, NEW_TOKENS = 1, 8
# Of different lengths, one of a single token; a rank has three of them, two, one or none at all.
LENGTHS = (5, 1, 9)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def _continued_by_transformers(name: str) -> list[list[int]]:
    prompts = _prompts()
    longest = max(LENGTHS)
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with Widened():
        output = make_model(name, torch.float64).generate(
            input_ids=token_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=EOD_ID,
            pad_token_id=EOD_ID,
        )
    rows = [[*row, EOD_ID] for row in output[:, longest:].tolist()]
    return [row[: row.index(EOD_ID)] for row in rows]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    for name in CONFIGS:
        continued = _continued_by_transformers(name)
        torch.save((reference(name, torch.float64, Batch.ragged()), continued), folder / f"{name}.pt")
    return folder


def _compare(rank: int, world_size: int, folder: Path) -> dict[str, dict[int, list[int]]]:
    dist.barrier()  # else a rank closes connections that another one is still making
    dist.destroy_process_group()
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    groups = join_groups(
        rank=rank, world_size=world_size, store=store, config=ParallelConfig(), device=CPU, timeout_s=20.0
    )
    sampled = {}
    for file in sorted(folder.glob("*.pt")):
        expected: Reference
        expected, continued = torch.load(file, weights_only=False)
        model = build(expected, groups)
        bias = read_bias(routers_of(model))
        for batch_size in (1, 32):
            greedy = SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=batch_size)
            found = generate(model, _prompts(), greedy, groups, eod_id=EOD_ID, autocast=nullcontext())
            mine = range(rank, len(LENGTHS), world_size)
            assert found.new_ids == {index: continued[index] for index in mine}, file.stem
            assert found.speed.prompt_tokens == sum(LENGTHS[index] for index in mine)
        sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=0.9, seed=5)
        sampled[file.stem] = generate(
            model, _prompts(), sampling, groups, eod_id=EOD_ID, autocast=nullcontext()
        ).new_ids
        assert not read_counts(routers_of(model)).any()
        assert torch.equal(read_bias(routers_of(model)), bias)
    return sampled


@pytest.fixture(scope="module")
def sampled_by_one(references: Path) -> dict[str, dict[int, list[int]]]:
    return run_ranks(1, _compare, references)[0]


@pytest.mark.parametrize("ep_size", [2, 4])
def test_generation_equals_that_of_transformers_and_does_not_depend_on_the_ranks(
    ep_size: int, references: Path, sampled_by_one: dict[str, dict[int, list[int]]]
) -> None:
    by_rank = run_ranks(ep_size, _compare, references)
    for name, texts in sampled_by_one.items():
        assert {index: ids for rank in by_rank for index, ids in rank[name].items()} == texts
