"""Adapters against the model with their products added to its weights, whose gradients say what theirs must be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.local import LocalDispatcher
from runtime.settings.config import cross_check
from runtime.settings.config_file import load_config, override
from tests.ranks import run_ranks
from tests.workers.model.token_loss import token_nll_sum
from tests.workers.training_gang import join_worker, make_spec, whole_state
from workers.checkpoints.checkpoint_files import latest
from workers.checkpoints.tensor_reader import TensorReader
from workers.model.attention import KeyValueCache, LatentConfig
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.lora import LoraConfig, adapter_names, is_adapter
from workers.model.model_config import ModelConfig
from workers.training.training_run import TrainingRun

MODEL = ModelConfig(
    vocab_size=7,
    hidden=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    dense_ffn_hidden=10,
    moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden=6, num_shared_experts=1, shared_gate=True),
    lora=LoraConfig(rank=3, alpha=4.5, targets=("attention", "experts", "dense_ffn", "shared_experts")),
)
LATENT = replace(MODEL, attention="latent", latent=LatentConfig(query_rank=4, kv_rank=4, nope_dim=4, rope_dim=4))
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 3, 1, 0, 2, 5]])


def adapted_and_merged(config: ModelConfig, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """A model whose adapters do something, and one without adapters that computes the same."""
    configs = (config, replace(config, lora=LoraConfig()))
    adapted, merged = (Decoder(each, lambda: LocalDispatcher(4)) for each in configs)
    for model in (adapted, merged):
        init_weights(model, seed=0)
        model.to(dtype)
    parameters, generator = dict(adapted.named_parameters()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in filter(is_adapter, parameters):
            parameters[name].copy_(torch.randn(parameters[name].shape, generator=generator, dtype=dtype))
        for name, weight in merged.named_parameters():
            if adapter_names(name)[0] in parameters:
                lora_a, lora_b = (parameters[each] for each in adapter_names(name))
                weight.add_(lora_b @ lora_a, alpha=config.lora.scale)
    return adapted, merged


@pytest.mark.parametrize(
    ("config", "dtype", "rtol"),
    [
        (MODEL, torch.float64, 1e-12),
        (replace(MODEL, recompute="full"), torch.float64, 1e-12),
        (LATENT, torch.float64, 1e-12),
        (MODEL, torch.float32, 1e-4),  # experts by the grouped matmul
    ],
    ids=["loop", "recompute", "latent", "grouped"],
)
def test_outputs_and_gradients_follow_from_those_of_the_merged_model(
    config: ModelConfig, dtype: torch.dtype, rtol: float
) -> None:
    adapted, merged = adapted_and_merged(config, dtype)
    losses = [token_nll_sum(model(IDS[:, :-1]), IDS[:, 1:]) for model in (adapted, merged)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=rtol, atol=0)
    parameters, num_adapters = dict(adapted.named_parameters()), 0
    for name, weight in merged.named_parameters():
        assert parameters[name].grad is None
        if adapter_names(name)[0] not in parameters:
            continue
        # W + s B A, so that dA = s B' dW and dB = s dW A'.
        lora_a, lora_b = (parameters[each] for each in adapter_names(name))
        gradient = config.lora.scale * weight.grad
        for found, wanted in ((lora_a.grad, lora_b.mT @ gradient), (lora_b.grad, gradient @ lora_a.mT)):
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())
        num_adapters += 1
    # Attention of two layers; a dense feed-forward and shared experts, three matrices each; two stacks of experts.
    assert num_adapters == (10 if config.attention == "latent" else 4) + 6 + 2


@torch.no_grad()
def test_latents_in_a_cache_meet_the_adapted_projection() -> None:
    adapted, _ = adapted_and_merged(LATENT, torch.float64)
    cache = KeyValueCache(6)
    adapted(IDS[:, :5], cache=cache, positions=torch.arange(5).expand(2, -1), token_mask=torch.ones(2, 5).bool())
    last = adapted(IDS[:, 5:], cache=cache, positions=torch.full((2, 1), 5), token_mask=torch.ones(2, 1).bool())
    torch.testing.assert_close(last[:, 0], adapted(IDS)[:, -1], rtol=1e-10, atol=1e-10)


def test_what_cannot_have_adapters_is_refused() -> None:
    for wrong, message in (
        ({"rank": -1}, r"lora.rank \(-1\) must be a whole number"),
        ({"alpha": 0.0}, r"lora.alpha \(0.0\) must be above 0"),
        ({"targets": ("router",)}, "lora.targets names router; parts that can have adapters are attention, experts"),
        ({"targets": ()}, "lora.targets names nothing"),
    ):
        with pytest.raises(InvalidValue, match=message):
            LoraConfig(**wrong)
    with pytest.raises(InvalidValue, match="names shared_experts, which this model does not have"):
        replace(MODEL, moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden=6, num_shared_experts=0))
    for variant in ({"expert_biases": True}, {"swiglu_limit": 7.0}):
        with pytest.raises(InvalidValue, match=r"lora.targets names experts, and those of this model have biases"):
            replace(MODEL, moe=replace(MODEL.moe, **variant))
    both = ["--model.lora.rank", "2", "--model.lora.targets", "[experts]", "--optim.freeze", "[experts]"]
    with pytest.raises(InvalidValue, match=r"model.lora.targets and optim.freeze both name experts"):
        cross_check(override(load_config("tiny"), both))


def _train(rank, world_size, spec, name) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole state before and after three steps."""
    worker = join_worker(spec, rank, world_size, name, float64=True)
    before = whole_state(worker)
    with worker._state.open_control() as control:
        run = TrainingRun(worker._state, control, publish=print, stop_requested=worker._stop_requested)
        for step in (1, 2, 3):
            run.trainer.step(step)
    return before, whole_state(worker)


def test_any_ep_size_trains_the_same_adapters_and_keeps_the_base_to_the_bit(tmp_path):
    spec = make_spec(tmp_path)
    lora = LoraConfig(rank=3, alpha=5.0, targets=("attention", "experts"))
    # In the shape of Qwen3-MoE.
    moe = replace(spec.model.moe, score="softmax")
    spec = replace(spec, model=replace(spec.model, query_key_norm="head", lora=lora, moe=moe))
    _, one = run_ranks(1, _train, spec, "one")[0]
    for ep_size in (1, 2, 4):
        of_size = replace(spec, parallel=replace(spec.parallel, ep_size=ep_size))
        before, after = run_ranks(4, _train, of_size, f"lora-{ep_size}")[0]
        adapters = set(filter(is_adapter, after))
        assert {key.split(".")[0] for key in adapters} == {"model", "optim"}
        assert not [key for key in after if key.startswith("optim.") and key not in adapters]
        assert {key for key in after if not torch.equal(before[key], after[key])} == adapters
        for key in adapters:
            torch.testing.assert_close(after[key], one[key], rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


def _train_on(rank, world_size, spec, name, stop_after, path):
    outcome = join_worker(spec, rank, world_size, name, stop_after=stop_after).train(path)
    return outcome.step


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path):
    model = replace(make_spec(tmp_path).model, lora=LoraConfig(rank=2, targets=("attention", "experts", "dense_ffn")))
    spec = replace(make_spec(tmp_path, steps=6), model=model)
    runs = [replace(spec, run_dir=tmp_path / name) for name in ("whole", "parts")]
    run_ranks(2, _train_on, runs[0], "whole", None, None)
    assert run_ranks(2, _train_on, runs[1], "first", 3, None)[0] == 3
    run_ranks(2, _train_on, runs[1], "second", None, latest(runs[1].run_dir / "checkpoints"))
    whole, parts = (_tensors(latest(run.run_dir / "checkpoints")) for run in runs)
    assert whole.keys() == parts.keys()
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert "model.layers.1.moe.experts.7.down_proj_lora_B" in whole


def _tensors(path) -> dict[str, Tensor]:
    reader = TensorReader(path)
    return reader.read(reader.shapes)
