"""Adapters of imported runs: trained, written for PEFT, and added to the weights."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dispatch.exchange.local import LocalDispatcher
from runtime.cli import main
from runtime.job.launch import make_spec
from runtime.settings.config_file import config_from_yaml_file
from tests.ranks import run_ranks
from tests.runtime.commands.hf.test_round_trip import all_tensors, export, import_run, our_logits
from tests.workers.model.families.directories import write_directory
from tests.workers.model.families.hugging_face import CONFIGS, Batch, auto_class
from tests.workers.training_gang import join_worker
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import latest
from workers.checkpoints.state import canonical_state
from workers.checkpoints.tensor_reader import TensorReader
from workers.data.prepare import prepare_dataset
from workers.model.decoder import Decoder
from workers.model.lora import is_adapter, without_adapters


def targets_of(name: str) -> list[str]:
    """All parts of a model of CONFIGS that can have adapters."""
    if name == "gpt_oss":  # whose experts have biases
        return ["attention"]
    parts = ["attention", "experts"]
    if name.split()[0] not in ("qwen2_moe", "mixtral", "olmoe", "minimax_m2", "solar_open"):
        parts.append("dense_ffn")
    if name.split()[0] not in ("qwen3_moe", "mixtral", "olmoe", "minimax_m2"):
        parts.append("shared_experts")
    return parts


def run_with_adapters(folder: Path, name: str, targets: list[str]) -> Path:
    """An imported run with a checkpoint in which adapters have done something."""
    run = folder / "run"
    options = ["--model.lora.rank", "4", "--model.lora.alpha", "6", "--model.lora.targets", json.dumps(targets)]
    import_run(write_directory(folder / "source", name), run, *options)
    config = config_from_yaml_file(run / "config.yaml").model
    model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts))
    state = canonical_state(model)
    extra = checkpoint.load(latest(run / "checkpoints"), without_adapters(state), None, sections=("model",))
    generator = torch.Generator().manual_seed(4)
    for key in filter(is_adapter, state):
        # Small enough for fp32 to agree in another order of products to 1e-5.
        state[key].copy_(torch.randn(state[key].shape, generator=generator) * 0.4 * state[key].shape[-1] ** -0.5)
    checkpoint.save(run / "checkpoints", 1, state, {**extra, "step": 1, "imported": False}, None)
    return run


def their_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch.token_ids, attention_mask=batch.mask.long()).logits


SOON = ("deepseek_v3", "qwen3_moe", "mixtral", "hy_v3", "afmoe")  # the others are slow tests


@pytest.mark.parametrize(
    "name", [*SOON, *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in SOON)]
)
def test_peft_and_the_merged_model_compute_what_the_adapters_do_here(name: str, tmp_path: Path) -> None:
    run, batch = run_with_adapters(tmp_path, name, targets_of(name)), Batch.ragged()
    export(run, tmp_path / "merged", "--merged")
    ours, auto = our_logits(run, batch)[batch.mask], auto_class(name)
    base = auto.from_pretrained(tmp_path / "source")
    without = their_logits(base, batch)[batch.mask]
    assert (ours - without).abs().max() > 0.1
    merged = their_logits(auto.from_pretrained(tmp_path / "merged"), batch)
    torch.testing.assert_close(merged[batch.mask], ours, rtol=1e-5, atol=1e-5)
    if name == "kimi_k25":  # in a model of several parts they have other names
        assert main(["export", str(run), str(tmp_path / "adapter")]) == 2
        return
    export(run, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(their_logits(adapted, batch)[batch.mask], ours, rtol=1e-5, atol=1e-5)


def _train(rank: int, world_size: int, run: Path, name: str, stop_after: int | None) -> None:
    config = config_from_yaml_file(run / "config.yaml")
    spec = make_spec(config, run, prepare_dataset(config.data))
    worker = join_worker(spec, rank, world_size, name, stop_after=stop_after)
    worker.train(latest(run / "checkpoints"))


@pytest.mark.slow
def test_an_imported_model_trains_adapters_that_peft_loads_and_stays_as_it_was(tmp_path: Path) -> None:
    source, text = write_directory(tmp_path / "source", "qwen3_moe"), tmp_path / "text.txt"
    text.write_text("\n".join(f"w{2 + n % 50} w{2 + n * 7 % 57} w{2 + n * n % 53}" for n in range(600)))
    options = ["--data.path", json.dumps([str(text)]), "--data.cache_dir", str(tmp_path / "cache")]
    options += ["--model.lora.rank", "4", "--model.lora.targets", "[attention, experts]", "--balance.law", "sign"]
    options += ["--optim.lr", "2e-3"]
    run, batch = tmp_path / "run", Batch.ragged()
    import_run(source, run, *options)
    untrained = TensorReader(latest(run / "checkpoints"))
    assert main(["export", str(run), str(tmp_path / "early")]) == 2  # no adapters yet
    # Whole experts go to other ranks, with their adapters.
    run_ranks(2, _train, run, "first", 4)
    run_ranks(4, _train, run, "second", None)
    trained = TensorReader(latest(run / "checkpoints"))
    assert trained.manifest.step == 10
    for name in untrained.shapes:
        assert torch.equal(untrained.read([name])[name], trained.read([name])[name]), name
    assert main(["doctor", str(latest(run / "checkpoints"))]) == 0
    export(run, tmp_path / "adapter")
    export(run, tmp_path / "merged", "--merged")
    ours, base = our_logits(run, batch)[batch.mask], AutoModelForCausalLM.from_pretrained(source)
    assert (ours - their_logits(base, batch)[batch.mask]).abs().max() > 0.01
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
    ):
        torch.testing.assert_close(their_logits(model, batch)[batch.mask], ours, rtol=1e-5, atol=1e-5)
    before, after = all_tensors(source), all_tensors(tmp_path / "merged")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj.weight" in name and ("attn" in name or ".experts." in name)}


def test_a_run_without_adapters_has_none_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_run(write_directory(tmp_path / "source", "olmoe"), tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merged"]) == 2
    assert "has no adapters to merge (model.lora.rank 0); leave out --merged" in capsys.readouterr().err
