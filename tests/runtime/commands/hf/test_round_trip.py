"""Import and export: every byte comes back, and what was trained in between computes the same in transformers."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dispatch.exchange.local import LocalDispatcher
from runtime import stream_weights
from runtime.cli import main
from runtime.job.launch import make_spec
from runtime.runs.hf_files import read_dtypes
from runtime.settings.config_file import config_from_yaml_file
from tests.ranks import run_ranks
from tests.workers.model.families.directories import PREFIX, quantise, to_mxfp4, write_directory, write_with_mtp
from tests.workers.model.families.hugging_face import CONFIGS, Batch, auto_class, is_of_vision
from tests.workers.training_gang import join_worker
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import latest, read_manifest
from workers.checkpoints.state import canonical_state
from workers.data.prepare import prepare_dataset
from workers.model.attention import positions_of
from workers.model.decoder import Decoder

WITH_MTP = "deepseek_v3 with multi-token prediction"
# Together they train all kinds of parameters; the others are slow tests.
TRAINED = ("deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", WITH_MTP)
SMALL = ["--model.max_seq_len", "16", "--run.global_batch_size", "4", "--run.steps", "10", "--optim.warmup_steps", "0"]


def import_run(source: Path, run: Path, *options: str, workers: int = 1) -> None:
    assert main(["import", str(source), str(run), "--workers", str(workers), *SMALL, *options]) == 0


def export(run: Path, folder: Path, *options: str) -> None:
    assert main(["export", str(run), str(folder), *options]) == 0


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bytes(first: Path, second: Path) -> None:
    assert_same_tensors(all_tensors(first), all_tensors(second))


def assert_same_tensors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        # Bytes, not values: -0.0 equals 0.0.
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("name", "dtype"), [("deepseek_v3", torch.float32), *((name, torch.bfloat16) for name in CONFIGS)]
)
def test_every_tensor_comes_back_byte_for_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_directory(tmp_path / "source", name, dtype, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    import_run(source, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    assert_same_bytes(source, tmp_path / "out")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    # The live model streams what export writes, in every family.
    stream = stream_weights(
        our_model(tmp_path / "run"), source / "config.json", None, dtype=read_dtypes(tmp_path / "run")
    )
    text = {name: tensor for name, tensor in all_tensors(source).items() if not is_of_vision(name)}
    assert_same_tensors(text, dict(stream))


def test_fp8_comes_back_as_bf16_that_transformers_loads(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    meant = quantise(source, block=12)
    import_run(source, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    exported = all_tensors(tmp_path / "out")
    assert not any("scale" in name for name in exported)
    for name, expected in meant.items():
        assert torch.equal(exported[name], expected.bfloat16()), name
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(loading.values()), loading


def test_mxfp4_comes_back_as_bf16_that_transformers_loads(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "source", "gpt_oss", torch.bfloat16)
    meant = to_mxfp4(source)
    import_run(source, tmp_path / "run", workers=2)
    export(tmp_path / "run", tmp_path / "out")
    exported, config = all_tensors(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(name.endswith(("_blocks", "_scales")) for name in exported)
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    for name, expected in meant.items():
        assert torch.equal(exported[name], expected), name
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    batch = Batch.ragged()
    with torch.no_grad():
        theirs = model.float()(input_ids=batch.token_ids, attention_mask=batch.mask.long()).logits
    torch.testing.assert_close(
        our_logits(tmp_path / "run", batch)[batch.mask], theirs[batch.mask], rtol=1e-5, atol=1e-5
    )


def test_processes_that_hold_a_shard_each_import_the_same(tmp_path: Path) -> None:
    source = write_directory(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    import_run(source, tmp_path / "run", workers=2)
    export(tmp_path / "run", tmp_path / "out", "--max-file-gb", "0.001")
    assert_same_bytes(source, tmp_path / "out")
    # Experts lie with the process that holds them, dense weights once.
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert manifest.world_size == 2
    # Nothing else is left behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "source"]
    assert not list((tmp_path / "run").glob(".*"))


def _train_all(rank: int, world_size: int, folder: Path) -> None:
    for run in sorted(folder.glob("run *")):
        config = config_from_yaml_file(run / "config.yaml")
        worker = join_worker(make_spec(config, run, prepare_dataset(config.data)), rank, world_size, run.name)
        outcome = worker.train(latest(run / "checkpoints"))
        assert (outcome.step, outcome.completed) == (10, True)


def our_model(run: Path) -> Decoder:
    config = config_from_yaml_file(run / "config.yaml").model
    model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts)).eval()
    checkpoint.load(latest(run / "checkpoints"), canonical_state(model), None, sections=("model",))
    return model


def our_logits(run: Path, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return our_model(run)(batch.token_ids, token_mask=batch.mask, positions=positions_of(batch.mask))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with a model's run, imported and trained for 10 steps by two ranks, with the others of its group."""
    groups = (TRAINED, tuple(name for name in CONFIGS if name not in TRAINED))
    train = functools.cache(lambda group: _train_group(group, tmp_path_factory.mktemp("trained")))
    return lambda name: train(next(group for group in groups if name in group))


def _train_group(names: tuple[str, ...], folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("\n".join(f"w{2 + n % 50} w{2 + n * 7 % 57} w{2 + n * n % 53}" for n in range(600)))
    data = ["--data.path", json.dumps([str(text)]), "--data.cache_dir", str(folder / "cache")]
    for name in names:
        source = folder / f"source {name}"
        if name == WITH_MTP:
            write_with_mtp(source, copies=True, dtype=torch.float32)
        else:
            write_directory(source, name)
        import_run(source, folder / f"run {name}", *data)
    run_ranks(2, _train_all, folder)
    return folder


# P21
@pytest.mark.parametrize(
    "name", [*TRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in TRAINED)]
)
def test_a_trained_export_computes_in_transformers_what_it_does_here(name: str, trained: Callable[[str], Path]) -> None:
    folder = trained(name)
    run, out = folder / f"run {name}", folder / f"out {name}"
    export(run, out)
    auto = AutoModelForCausalLM if name == WITH_MTP else auto_class(name)
    model, loading = auto.from_pretrained(out, output_loading_info=True)
    # It passes over the layer for multi-token prediction; at full size, where that is layer 61, in silence.
    assert all(name.startswith(PREFIX) for name in loading.pop("unexpected_keys"))
    assert not any(loading.values()), loading
    batch = Batch.ragged()
    with torch.no_grad():
        theirs = model.eval()(input_ids=batch.token_ids, attention_mask=batch.mask.long()).logits
    ours = our_logits(run, batch)
    torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], rtol=1e-5, atol=1e-5)
    before, after = all_tensors(folder / f"source {name}"), all_tensors(out)
    unmoved = [key for key in before if torch.equal(before[key], after[key]) and not is_of_vision(key)]
    assert before.keys() == after.keys()
    assert unmoved == []  # biases among them: the law moved them, and export kept it
    assert AutoTokenizer.from_pretrained(out)("w5 w6").input_ids == [5, 6]


def test_a_bias_that_the_family_lacks_is_not_lost_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_directory(tmp_path / "source", "olmoe")
    run = tmp_path / "run"
    import_run(source, run)
    config = config_from_yaml_file(run / "config.yaml")
    assert config.balance.law == "none"
    path = latest(run / "checkpoints")
    model = Decoder(config.model, lambda: LocalDispatcher(8))
    state = canonical_state(model)
    extra = checkpoint.load(path, state, None, sections=("model",))
    state["model.layers.1.moe.router.expert_bias_E"][3] = -0.001
    checkpoint.save(run / "checkpoints", 1, state, extra, None)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "1 routers" in message
    assert "layers.1.moe.router.expert_bias_E" in message
    assert "--drop-bias" in message
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", "--drop-bias")
    assert_same_bytes(source, tmp_path / "out")


def test_a_bias_that_moved_too_little_for_bf16_is_exported_in_fp32(tmp_path: Path) -> None:  # B23
    source = write_directory(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    # As some hub checkpoints have it.
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = all_tensors(source)
    tensors[name] = tensors[name].bfloat16()
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    import_run(source, run)
    export(run, tmp_path / "same")
    assert_same_bytes(source, tmp_path / "same")
    config = config_from_yaml_file(run / "config.yaml").model
    state = canonical_state(Decoder(config, lambda: LocalDispatcher(16)))
    extra = checkpoint.load(latest(run / "checkpoints"), state, None, sections=("model",))
    moved = state["model.layers.1.moe.router.expert_bias_E"].add_(0.001)
    checkpoint.save(run / "checkpoints", 1, state, extra, None)
    export(run, tmp_path / "moved")
    exported = all_tensors(tmp_path / "moved")[name]
    assert exported.dtype == torch.float32
    assert torch.equal(exported, moved)
