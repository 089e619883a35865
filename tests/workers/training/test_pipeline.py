"""A pipeline of ranks trains as one process does: loss, gradients, weights, biases and evaluations."""

import functools
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch

from cluster.failures.stall import find_stall
from dispatch.errors import InvalidValue
from dispatch.experts.stacked import Experts
from tests.ranks import run_ranks
from tests.workers.training_gang import LINES, join_worker, make_spec, whole_state
from workers.data.prepare import prepare_dataset
from workers.data.text import DataConfig
from workers.distributed.collateral import is_collateral
from workers.distributed.parallel import ParallelConfig
from workers.distributed.pipeline import PipelineConfig
from workers.distributed.sharded import is_sharded
from workers.model.lora import LoraConfig

INTERLEAVED = {"schedule": "interleaved_1f1b"}
# By number of ranks. Two dense layers of five: with four stages the first one has no experts.
LAYOUTS = {
    1: {"one": {}},
    2: {
        "pp2": {"size": 2},
        "pp2-interleaved": {"size": 2, "recompute": "full", **INTERLEAVED},
        "pp2-micro3": {"size": 2, "micro_batch_size": 3, "recompute": "experts"},
    },
    4: {
        "pp2-ep2": {"size": 2, "ep_size": 2},
        "pp2-ep1-interleaved": {"size": 2, "ep_size": 1, **INTERLEAVED},
        "pp4": {"size": 4, "micro_batch_size": 2},
        "pp2-optimizer": {"size": 2, "ep_size": 1, "shard": "optimizer", **INTERLEAVED},
        "pp2-full": {"size": 2, "ep_size": 1, "shard": "full", "recompute": "full"},
        "pp2-ep2-full": {"size": 2, "ep_size": 2, "shard": "full", **INTERLEAVED},
    },
    8: {
        "pp4-ep2": {"size": 4, "ep_size": 2},
        "pp2-dp4-full": {"size": 2, "ep_size": 2, "shard": "full"},
        "pp2-replicas": {"size": 2, "ep_size": 1, "shard": "full", "replicate": 2, **INTERLEAVED},
        # Its groups have other names than those of the same ranks before, in a process that had these.
        "pp2-ep2-replicas": {"size": 2, "ep_size": 2, "shard": "full", "replicate": 2},
    },
}


def _spec(tmp_path, name, *, size=1, micro_batch_size=1, recompute="none", steps=5, batch=12, **parallel):
    run = {"micro_batch_size": micro_batch_size, "global_batch_size": batch, "steps": steps}
    spec = make_spec(tmp_path, eval_every=2, memory_checkpoint_every=2, **run)
    pipeline = PipelineConfig(size=size, **({"schedule": parallel.pop("schedule")} if "schedule" in parallel else {}))
    parallel = ParallelConfig(pipeline=pipeline, **parallel)
    model = replace(spec.model, num_layers=5, num_dense_layers=2, recompute=recompute)
    return replace(spec, run_dir=tmp_path / name, model=model, parallel=parallel)


def _specs(tmp_path, world_size):
    return {name: _spec(tmp_path, name, **layout) for name, layout in LAYOUTS[world_size].items()}


def _gradients(model):
    """By name and global expert id, so that ranks can be compared."""
    found = {}
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Experts):
                experts = zip(module.expert_ids, _whole(parameter.grad), strict=True)
                found |= {f"{owner}.{expert_id}.{name}": gradient.clone() for expert_id, gradient in experts}
            else:
                found[f"{owner}.{name}"] = _whole(parameter.grad).clone()
    return found


def _whole(gradient):
    return gradient.full_tensor() if is_sharded(gradient) else gradient


def _train(rank, world_size, specs):
    results = {}
    for name, spec in specs.items():
        worker, gradients = join_worker(spec, rank, world_size, name, float64=True), []
        state = worker._state
        state.optimizer.register_step_pre_hook(lambda *_, g=gradients, m=state.model: g.append(_gradients(m)))
        worker.train()
        biases = torch.cat([router.expert_bias_E for router in state.routers.values()])
        results[name] = whole_state(worker), worker.progress(0), gradients[2], biases
    return results


@functools.cache
def _one_process(folder):
    return run_ranks(1, _train, _specs(folder, 1))[0]["one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


def _assert_close(found, expected, what):
    atol = 1e-12 * expected.abs().max().item() if expected.is_floating_point() else 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=atol, msg=lambda m: f"{what}: {m}")


SAME = {
    *("loss", "grad_norm", "val_loss", "val_bits_per_byte", "dead_experts", "tokens_routed", "tokens_received"),
    *("max_vio_batch_per_layer", "max_vio_held_out_per_layer", "max_vio_global_per_layer"),
}
SAME_MICRO_BATCHES = {"max_vio_computation_batch"}  # of what is computed at once


def _assert_same_lines(lines, expected_lines, name, world_size, num_lines):
    fields = SAME | (SAME_MICRO_BATCHES if name in ("pp2", "pp2-interleaved") else set())
    lines, expected_lines = (
        [line for line in each if line.get("kind") in ("train", "eval")] for each in (lines, expected_lines)
    )
    assert len(lines) == len(expected_lines) == num_lines
    for line, expected in zip(lines, expected_lines, strict=True):
        for field in fields & expected.keys():
            wanted = None if expected[field] is None else pytest.approx(expected[field], rel=1e-10)
            assert line[field] == wanted, (name, field)
        if line["kind"] == "train":
            flops = [each["tflops_per_s"] / each["tokens_per_s"] for each in (line, expected)]
            assert flops[0] * world_size == pytest.approx(flops[1], rel=1e-9)


# B8
@pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))])
def test_stages_train_as_one_process_does(folder, world_size):
    weights, lines, gradients, biases = _one_process(folder)
    assert biases.any()
    ranks = run_ranks(world_size, _train, _specs(folder, world_size))
    for name in LAYOUTS[world_size]:
        found, found_lines, _, _ = ranks[0][name]
        assert found.keys() == weights.keys()
        for key, expected in weights.items():
            _assert_close(found[key], expected, f"{name} {key}")
        assert {key for rank in ranks for key in rank[name][2]} == gradients.keys()
        for key, gradient in ((key, gradient) for rank in ranks for key, gradient in rank[name][2].items()):
            _assert_close(gradient, gradients[key], f"{name} gradient of {key}")
        assert all(torch.equal(rank[name][3], biases) for rank in ranks)
        _assert_same_lines(found_lines, lines, name, world_size, num_lines=5 + 4)  # steps, evaluations


# On 4 ranks: changes of a run, by section, and how they are laid out.
KINDS = {
    "adapters": (
        {"model": {"lora": LoraConfig(rank=2, targets=("attention", "experts"))}},
        [{"size": 2, "ep_size": 2, "recompute": "full"}, {"size": 2, "ep_size": 1, "shard": "full", **INTERLEAVED}],
    ),
    "frozen": (
        {"optim": {"freeze": ("embedding", "router", "norms")}},
        [{"size": 4}, {"size": 2, "ep_size": 1, "shard": "optimizer"}],
    ),
    # Where the first stage alone has dense parameters that train, and experts have one holder.
    "frozen but for dense_ffn and experts": (
        {"optim": {"freeze": ("embedding", "attention", "router", "norms", "shared_experts")}},
        [{"size": 2, "shard": "full"}],
    ),
    "tied": ({"model": {"tie_embeddings": True}}, [{"size": 2, "ep_size": 2}, {"size": 4}]),
    "multi-token": (
        {"model": {"num_mtp_layers": 1}},
        [
            {"size": 2, "ep_size": 2, "recompute": "full", **INTERLEAVED},
            {"size": 2, "ep_size": 1, "shard": "full"},
            {"size": 2, "ep_size": 1, "shard": "optimizer", **INTERLEAVED},
        ],
    ),
    "offloaded": ({"optim": {"offload": "states"}}, [{"size": 2, "ep_size": 2}, {"size": 2, "shard": "full"}]),
}


def _specs_of_kinds(folder, world_size, kinds):
    specs = {}
    for kind in kinds:
        changes, layouts = KINDS[kind]
        for index, layout in enumerate(layouts if world_size > 1 else [{}]):
            # Two steps make moments and a bias that the third one uses; 4 micro-batches of each of two pipelines.
            spec = _spec(folder, f"{kind}-{world_size}-{index}", steps=3, batch=8, **layout)
            changed = {section: replace(getattr(spec, section), **values) for section, values in changes.items()}
            specs[kind, index] = replace(spec, **changed)
    return specs


def _train_kinds(rank, world_size, specs):
    found = {}
    for key, spec in specs.items():
        worker = join_worker(spec, rank, world_size, spec.run_dir.name, float64=True)
        worker.train()
        routers = worker._state.routers.values()
        biases = torch.cat([router.expert_bias_E for router in routers])
        found[key] = whole_state(worker), biases, worker.progress(0)
    return found


SOON = ("adapters", "multi-token")
LATER = tuple(kind for kind in KINDS if kind not in SOON)


@pytest.mark.parametrize("kinds", [SOON, pytest.param(LATER, marks=pytest.mark.slow)], ids=["some", "the others"])
def test_stages_train_parts_of_a_model_as_one_process_does(folder, kinds):
    (whole,) = run_ranks(1, _train_kinds, _specs_of_kinds(folder, 1, kinds))
    by_rank = run_ranks(4, _train_kinds, _specs_of_kinds(folder, 4, kinds))
    for (kind, index), (_, _, lines) in by_rank[0].items():
        _assert_same_lines(lines, whole[kind, 0][2], f"{kind} {index}", 4, num_lines=3 + 3)
    for found in by_rank:
        for (kind, index), (weights, biases, _) in found.items():
            expected, expected_biases, _ = whole[kind, 0]
            assert torch.equal(biases, expected_biases), kind
            trains_routers = kind in ("tied", "multi-token", "offloaded")
            assert biases.any() == trains_routers  # a frozen router is not balanced
            assert weights.keys() == expected.keys()
            for key, value in expected.items():
                _assert_close(weights[key], value, f"{kind} {index} {key}")


def _train_packed(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, spec.run_dir.name, float64=True)
    worker.train()
    return whole_state(worker)


def test_documents_packed_into_sequences_stay_apart_in_every_stage(folder):
    text = folder / "pages"
    text.mkdir()
    for number, line in enumerate(LINES[:300]):
        (text / f"{number}.txt").write_text(line * (1 + number % 3))
    dataset = prepare_dataset(DataConfig(path=(str(text),), pack_documents=True, cache_dir=str(folder / "cache")))
    states = {}
    for world_size, layout in {1: {}, 2: {"size": 2}}.items():
        spec = replace(_spec(folder, f"packed{world_size}", steps=2, **layout), data_dir=dataset.path)
        states[world_size] = run_ranks(world_size, _train_packed, spec)[0]
    assert states[1].keys() == states[2].keys()
    for key, expected in states[1].items():
        _assert_close(states[2][key], expected, key)


def _train_from(rank, world_size, spec, path, stop_after):
    name = f"{spec.run_dir.name}-{stop_after}"
    worker = join_worker(spec, rank, world_size, name, float64=True, stop_after=stop_after)
    worker.train(path)
    return whole_state(worker)


# By the layout that a checkpoint is of: by number of ranks, those that go on from it.
RESUMES = {
    (4, 2): {1: {}, 2: {"size": 2, **INTERLEAVED}, 4: {"size": 2, "ep_size": 1, "shard": "full"}},
    (1, 1): {2: {"size": 2}},
}


@pytest.mark.parametrize(("num_ranks", "size"), RESUMES)
def test_a_checkpoint_of_one_pipeline_is_read_by_any_other(folder, num_ranks, size):
    weights = _one_process(folder)[0]
    first = _spec(folder, f"first{size}", size=size, **({"ep_size": 1, "shard": "optimizer"} if num_ranks > 1 else {}))
    run_ranks(num_ranks, _train_from, first, None, 3)
    for world_size, layout in RESUMES[num_ranks, size].items():
        spec = _spec(folder, f"from{size}-{world_size}", **layout)
        shutil.copytree(first.run_dir, spec.run_dir)
        path = spec.run_dir / "checkpoints" / "step_00000003"
        found = run_ranks(world_size, _train_from, spec, path, None)[0]
        for key, expected in weights.items():
            _assert_close(found[key], expected, f"{world_size} ranks, {key}")


def test_a_checkpoint_of_stages_that_share_the_embedding_is_read_by_any_pipeline(folder):
    def spec(name, **layout):
        plain = _spec(folder, f"shared-{name}", **layout)
        return replace(plain, model=replace(plain.model, tie_embeddings=True, num_mtp_layers=1))

    weights = run_ranks(2, _train_from, spec("whole", size=2), None, None)[0]
    first = spec("first", size=2)
    run_ranks(2, _train_from, first, None, 3)
    for world_size, size in ((1, 1), (4, 4)):
        later = spec(f"on-{world_size}", size=size)
        shutil.copytree(first.run_dir, later.run_dir)
        found = run_ranks(world_size, _train_from, later, later.run_dir / "checkpoints" / "step_00000003", None)[0]
        assert found.keys() == weights.keys()
        for key, expected in weights.items():
            _assert_close(found[key], expected, f"{world_size} ranks, {key}")


def _load_biases(rank, world_size, spec, path):
    """The biases that a stage holds of all layers once it has read the weights alone, as of an imported model."""
    worker = join_worker(spec, rank, world_size, "biases", float64=True)
    worker._state.load_weights(path)
    return torch.cat([router.expert_bias_E for router in worker._state.routers.values()])


def test_weights_alone_bring_the_biases_of_all_stages(folder):
    biases = _one_process(folder)[3]
    path = folder / "one" / "checkpoints" / "step_00000005"
    for found in run_ranks(2, _load_biases, _spec(folder, "biases", size=2), path):
        assert torch.equal(found, biases)


def _train_bf16(rank, world_size, spec):
    worker = join_worker(spec, rank, world_size, spec.run_dir.name)
    worker.train()
    return [line["loss"] for line in worker.progress(0) if line.get("kind") == "train"]


def test_stages_compute_in_bf16_as_one_process_does(folder):
    losses = {}
    for world_size, layout in {1: {}, 2: {"size": 2, "recompute": "full"}}.items():
        spec = _spec(folder, f"bf16-{world_size}", **layout)
        spec = replace(spec, run=replace(spec.run, dtype="bfloat16"))
        losses[world_size] = run_ranks(world_size, _train_bf16, spec)[0]
    assert losses[2] == pytest.approx(losses[1], rel=2e-3)


def _stall(answers):
    return find_stall(answers, {0: "rank 0", 1: "rank 1"}, 0.5, "the bound", {})


def _hang(rank, world_size, spec):
    """What a rank says of itself while rank 0 stands still in the second step and rank 1 waits for it."""
    worker = join_worker(spec, rank, world_size, "hang")
    noticed = spec.run_dir.parent / "rank 1 waits"
    in_step, answers = threading.Event(), []
    draw = worker._state.sampler.batch

    def until(condition):
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        answers.append(worker.activity())

    def batch(step, *place):
        if step == 1 and not in_step.is_set():
            in_step.set()
            if rank == 0:
                until(noticed.exists)
        return draw(step, *place)

    def watch():
        in_step.wait(30)
        until(lambda: _stall({0: None, 1: worker.activity()}))
        noticed.touch()

    worker._state.sampler.batch = batch
    watching = threading.Thread(target=watch if rank == 1 else in_step.wait)
    watching.start()
    worker.train()
    watching.join()
    return answers[0]


def test_a_stage_that_stands_still_is_named_by_the_one_that_waits_for_it(folder):
    spec = _spec(folder, "hang", size=2)
    spec = replace(spec, run=replace(spec.run, eval_every=0))
    stall = _stall(dict(enumerate(run_ranks(2, _hang, spec, timeout_s=60))))
    assert (stall.waiting, stall.missing) == ((1,), (0,))
    assert "stage 1 waits for activations of stage 0" in str(stall.error)


def _fail(rank, world_size, spec):
    """Which errors the ranks end with when one fails in forward, and then when it fails in backward."""
    found = []
    for place in ("forward", "backward"):
        spec = replace(spec, run_dir=spec.run_dir.parent / place)
        worker = join_worker(spec, rank, world_size, place)

        def fail(*_):
            raise InvalidValue("it is wrong")

        if rank == 1:
            block = worker._state.model.layers.get_submodule("4")
            block.register_forward_hook(fail) if place == "forward" else block.attention_norm.weight.register_hook(fail)
        try:
            worker.train()
        except RuntimeError as error:
            found.append(is_collateral(str(error)))
        except InvalidValue:
            found.append("own")
        worker.leave()
    return found


def test_an_error_inside_a_stage_keeps_its_type_and_the_others_know_that_it_is_not_theirs(folder):
    spec = _spec(folder, "fail", size=2)
    spec = replace(spec, run=replace(spec.run, eval_every=0))
    assert run_ranks(2, _fail, spec, timeout_s=60) == [[True, True], ["own", "own"]]
