"""Samples show what the weights of now say, and which experts took each token; training does not notice them."""

import json
from dataclasses import replace

import pytest
import torch

from dispatch.balance import routers_of
from dispatch.laws import BalanceConfig
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.data.tokenizer import ByteTokenizer
from workers.distributed.parallel import ParallelConfig
from workers.record.run_log import read_metrics
from workers.training.samples import SampleTaker

PROMPTS = ("400 green", "", "\N{GRINNING FACE} wall, and if one should")  # the last one outgrows the model of 16 tokens
NUM_NEW = 6
TIMES = ("time", "tokens_per_s", "tflops_per_s")


def _with_run(spec, name, parallel=None, **run):
    parallel = parallel or spec.parallel
    return replace(spec, run_dir=spec.run_dir.parent / name, parallel=parallel, run=replace(spec.run, **run))


def _samples(run_dir):
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def _untimed(line):
    return {name: value for name, value in line.items() if name not in TIMES and not name.endswith("_s")}


def _train(rank, world_size, specs):
    found = []
    for spec in specs:
        worker = join_worker(spec, rank, world_size, spec.run_dir.name)
        torch.manual_seed(7)
        worker.train()
        found.append((whole_state(worker), torch.get_rng_state()))
    return found


def test_a_run_with_samples_trains_bit_for_bit_as_one_without(tmp_path):
    spec = replace(make_spec(tmp_path, steps=4, eval_every=2), balance=BalanceConfig(law="newton"))
    plain = _with_run(spec, "plain")
    # One prompt: rank 1 has none. Three: rank 0 has two of them.
    sampled = [
        _with_run(
            spec, f"with-{num}", sample_prompts=PROMPTS[:num], sample_tokens=NUM_NEW, sample_temperature=temperature
        )
        for num, temperature in ((1, 0.0), (3, 1.0))
    ]
    for rank, (expected, *found) in enumerate(run_ranks(2, _train, [plain, *sampled])):
        for state, generator in found:
            assert torch.equal(generator, expected[1]), rank
            assert state.keys() == expected[0].keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected[0].items())
    for each in sampled:
        for file in ("history.bin", "statistics.bin"):
            assert (each.run_dir / "load" / file).read_bytes() == (plain.run_dir / "load" / file).read_bytes()
        for found, lines in zip(read_metrics(each.run_dir), read_metrics(plain.run_dir), strict=True):
            assert [_untimed(line) for line in found] == [_untimed(line) for line in lines]
        where = [(line["step"], line["sample"]) for line in _samples(each.run_dir)]
        assert where == [(step, number) for step in (0, 2, 4) for number in range(len(each.run.sample_prompts))]
    assert not (plain.run_dir / "samples.jsonl").exists()


COPIES = {"expert_copies": 1, "copies_every": 1}
LAYOUTS = {
    1: [{}],
    2: [{}, {"context": 2}, {"shard": "full"}, {"shard": "optimizer", "ep_size": 1}, COPIES],
    4: [{"exchange": "assignment"}, {"ep_size": 2, "shard": "full"}],  # more ranks than prompts
}  # fmt: skip


def _train_layouts(rank, world_size, spec):
    for index, layout in enumerate(LAYOUTS[world_size]):
        name = f"w{world_size}-{index}"
        worker = join_worker(_with_run(spec, name, ParallelConfig(**layout)), rank, world_size, name, float64=True)
        worker.train()


@pytest.mark.slow
def test_any_layout_of_ranks_takes_the_same_samples(tmp_path):
    spec = make_spec(tmp_path, steps=2, eval_every=2, sample_prompts=PROMPTS, sample_tokens=NUM_NEW)
    for world_size in LAYOUTS:
        run_ranks(world_size, _train_layouts, spec)
    one = _samples(tmp_path / "w1-0")
    assert len(one) == 6
    for world_size, layouts in LAYOUTS.items():
        for index in range(len(layouts)):
            assert _samples(tmp_path / f"w{world_size}-{index}") == one, layouts[index]


def _reference(model, ids):
    """The likeliest next token, and the experts of each token, by one forward over all of them."""
    chosen = {}
    handles = [
        router.register_forward_hook(lambda _router, _inputs, choice, name=name: chosen.update({name: choice[0]}))
        for name, router in routers_of(model).items()
    ]
    logits = model(torch.tensor([ids]))[0, -1]
    for handle in handles:
        handle.remove()
    return int(logits.argmax()), {name: ids_TK.tolist() for name, ids_TK in chosen.items()}


def _take(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, "taken", float64=True)
    state, tokenizer = worker._state, ByteTokenizer()
    samples = SampleTaker(state).take()
    assert state.model.training
    state.model.eval()
    references = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids, experts = (tokenizer.encode(prompt).tolist() or [256]), {}
            num_prompt, first = len(ids), max(0, len(ids) - 16)
            for _ in range(NUM_NEW):
                following, found = _reference(state.model, ids[first:])
                for name, ids_TK in found.items():
                    for place, chosen in enumerate(ids_TK, first):
                        experts.setdefault(name, {}).setdefault(place, chosen)
                if following == 256:
                    break
                ids.append(following)
                first = first if len(ids) - first <= 16 else len(ids) - 8
            references.append((num_prompt, ids, experts))
    return samples, references


def test_a_sample_has_the_likeliest_tokens_and_the_experts_that_took_each(tmp_path):
    spec = make_spec(tmp_path, sample_prompts=PROMPTS, sample_tokens=NUM_NEW)
    [(samples, references)] = run_ranks(1, _take, spec)
    tokenizer = ByteTokenizer()
    for sample, (num_prompt, ids, experts) in zip(samples, references, strict=True):
        assert (len(sample["tokens"]), sample["num_prompt_tokens"]) == (len(ids), num_prompt)
        assert sample["prompt"] == "".join(sample["tokens"][:num_prompt])
        assert "".join(sample["tokens"][num_prompt:]) == tokenizer.decode(ids[num_prompt:])
        assert sample["experts"].keys() == experts.keys() == {"layers.1.moe.router", "layers.2.moe.router"}
        for name, by_place in experts.items():
            assert sample["experts"][name] == [by_place.get(place) for place in range(len(ids))]
            # Nobody has read the last token, unless an end of the document was chosen after it.
            assert (sample["experts"][name][-1] is None) == (len(ids) == num_prompt + NUM_NEW)
    too_long = samples[2]["experts"]["layers.1.moe.router"]
    assert too_long[: references[2][0] - 16].count(None) == references[2][0] - 16 > 0  # left out of what is read


def _train_and_resume(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, "first")
    worker.train()
    more = replace(spec, run=replace(spec.run, steps=6))
    join_worker(more, rank, world_size, "more").train(spec.run_dir / "checkpoints" / "step_00000002")


def test_samples_after_the_step_that_a_run_resumes_from_are_set_aside(tmp_path):
    run = {"steps": 4, "eval_every": 2, "checkpoint_every": 2, "sample_prompts": PROMPTS[:2], "sample_tokens": 2}
    spec = make_spec(tmp_path, **run)
    run_ranks(2, _train_and_resume, spec)
    assert [line["step"] for line in _samples(spec.run_dir)] == [0, 0, 2, 2, 4, 4, 6, 6]
    aside = (spec.run_dir / "samples.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [4, 4]
