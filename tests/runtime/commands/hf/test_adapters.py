"""Adapters of imported runs: trained, written for PEFT, and added to the weights."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dispatch.exchange.local import LocalDispatcher
from runtime.settings.config_file import config_from_yaml_file
from tests.runtime.commands.hf.test_round_trip import export, import_run, our_logits
from tests.workers.model.families.directories import write_directory
from tests.workers.model.families.hugging_face import CONFIGS, Batch
from workers.checkpoints import checkpoint
from workers.checkpoints.state import canonical_state
from workers.model.decoder import Decoder
from workers.model.lora import is_adapter, without_adapters


def targets_of(name: str) -> list[str]:
    """All parts of a model of CONFIGS that can have adapters."""
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
    extra = checkpoint.load(checkpoint.latest(run / "checkpoints"), without_adapters(state), None, sections=("model",))
    generator = torch.Generator().manual_seed(4)
    for key in filter(is_adapter, state):
        # Small enough for fp32 to agree in another order of products to 1e-5.
        state[key].copy_(torch.randn(state[key].shape, generator=generator) * 0.4 * state[key].shape[-1] ** -0.5)
    checkpoint.save(run / "checkpoints", 1, state, extra | {"imported": False}, None)
    return run


def their_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch.token_ids, attention_mask=batch.mask.long()).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_and_the_merged_model_compute_what_the_adapters_do_here(name: str, tmp_path: Path) -> None:
    run, batch = run_with_adapters(tmp_path, name, targets_of(name)), Batch.ragged()
    export(run, tmp_path / "adapter")
    export(run, tmp_path / "merged", "--merged")
    ours = our_logits(run, batch)[batch.mask]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    without = their_logits(base, batch)[batch.mask]
    assert (ours - without).abs().max() > 0.1
    merged = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch)
    torch.testing.assert_close(merged[batch.mask], ours, rtol=1e-5, atol=1e-5)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(their_logits(adapted, batch)[batch.mask], ours, rtol=1e-5, atol=1e-5)
