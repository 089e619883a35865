"""The decoder and its initial weights."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.balance import read_counts, routers_of
from dispatch.config import MoEConfig
from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.exchange.placement import ExpertPlacement
from dispatch.experts.stacked import expert_parameters
from tests.workers.model.token_loss import token_nll, token_nll_sum
from workers.model.attention import LatentConfig, positions_of
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.loss import after_next
from workers.model.model_config import ModelConfig, Recompute

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden": 24,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "dense_ffn_hidden": 20,
    "max_seq_len": 16,
    "moe": MoEConfig(num_experts=8, top_k=2, ffn_hidden=10),
}


# What gpt-oss adds.
VARIANT: dict[str, Any] = {
    "qkv_bias": True,
    "out_bias": True,
    "attention_sinks": True,
    "sliding_window": 3,
    "full_attention_every": 2,
    "moe": MoEConfig(num_experts=8, top_k=2, ffn_hidden=10, gate_bias=True, expert_biases=True, swiglu_limit=0.5),
}
both_kinds = pytest.mark.parametrize("settings", [{}, VARIANT], ids=["plain", "variant"])


class PlacedDispatcher(LocalDispatcher):
    """Holds the experts of one rank of a larger group; only for building models, it cannot dispatch."""

    def __init__(self, num_experts: int, ep_size: int, ep_rank: int) -> None:
        self.placement = ExpertPlacement(num_experts, ep_size)
        self.ep_rank = ep_rank
        self.meter, self.buffer_pool = Meter(), BufferPool()


def build(
    make_dispatcher: Callable[[], Dispatcher] = lambda: LocalDispatcher(8), *, seed: int = 0, **overrides: Any
) -> Decoder:
    model = Decoder(ModelConfig(**{**SMALL, **overrides}), make_dispatcher)
    init_weights(model, seed)
    return model


def tokens(batch: int = 2, seq_len: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


# --- the decoder -------------------------------------------------------------------------------------------------


def test_first_layers_are_dense_and_the_others_are_mixtures() -> None:
    model = build(num_dense_layers=2)
    names = {name for name, _ in model.named_parameters()}
    assert list(routers_of(model)) == ["layers.2.moe.router"]
    assert {"layers.0.ffn.gate_proj.weight", "layers.1.ffn.down_proj.weight"} <= names
    assert list(expert_parameters(model)) == [f"layers.2.moe.experts.{n}_proj" for n in ("gate_up", "down")]


def test_untrained_model_predicts_nearly_uniformly() -> None:
    model = build()
    logits = model(tokens())
    assert logits.shape == (2, 7, 11)
    loss = token_nll(logits, tokens(seed=1)).mean().item()
    assert abs(loss - math.log(11)) < 0.7


def test_future_tokens_change_neither_earlier_logits_nor_earlier_routing() -> None:  # B39
    model = build().double()
    chosen: list[Tensor] = []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda _module, _args, output: chosen.append(output[0].view(1, 8, 2)))
    ids = tokens(1, 8)
    permuted = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], dim=1)
    assert not torch.equal(ids, permuted)
    before, routing_before = model(ids), list(chosen)
    chosen.clear()
    after = model(permuted)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(after[:, 4:], before[:, 4:])
    for earlier, later in zip(routing_before, chosen, strict=True):
        assert torch.equal(earlier[:, :4], later[:, :4])


def test_trailing_padding_is_not_counted_and_changes_no_real_token() -> None:  # B5
    model = build().double()
    ids = tokens(2, 6)
    expected = model(ids)
    load = read_counts(routers_of(model))
    for router in routers_of(model).values():
        router.tokens_per_expert_E.zero_()
    padded = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones_like(ids, dtype=torch.bool), (0, 3))
    actual = model(padded, token_mask=mask)[:, :6]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(read_counts(routers_of(model)), load)
    assert load.sum() == 2 * (2 * 6) * 2  # MoE layers x tokens x top_k


@pytest.mark.parametrize("attention", ["grouped_query", "latent"])
def test_padding_anywhere_changes_no_real_token(attention: str) -> None:  # B5
    latent = LatentConfig(query_rank=6, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)
    model = build(attention=attention, latent=latent).double()
    ids, other = tokens(2, 6), tokens(2, 3, seed=5)
    expected = model(ids)
    load = read_counts(routers_of(model))
    for router in routers_of(model).values():
        router.tokens_per_expert_E.zero_()
    # Two before, one within, none after: what stands there is any token.
    padded = torch.cat([other[:, :2], ids[:, :3], other[:, 2:], ids[:, 3:]], dim=1)
    mask = torch.tensor([False, False, True, True, True, False, True, True, True]).expand(2, 9)
    actual = model(padded, token_mask=mask, positions=positions_of(mask))
    torch.testing.assert_close(actual[mask].view(2, 6, -1), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(read_counts(routers_of(model)), load)
    # A sequence of padding alone is finite, and so are its gradients.
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    model(padded, token_mask=nothing, positions=positions_of(nothing)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_window_ends_where_a_document_begins() -> None:
    model = build(sliding_window=3, full_attention_every=2, rotate_full_attention=False)
    ids = tokens(1, 12)
    starts = torch.tensor([[0] * 5 + [5] * 7])
    apart = torch.cat([model(ids[:, :5]), model(ids[:, 5:])], dim=1)
    torch.testing.assert_close(model(ids, document_starts=starts), apart)
    assert not torch.allclose(build()(ids), model(ids))


def test_given_positions_of_whole_sequences_are_the_default() -> None:
    model = build().double()
    positions = torch.arange(7).expand(2, 7)
    torch.testing.assert_close(model(tokens(), positions=positions), model(tokens()), rtol=1e-12, atol=1e-14)


def test_recompute_of_a_mtp_layer_changes_nothing() -> None:
    results = []
    for recompute in get_args(Recompute):
        model = build(recompute=recompute, num_mtp_layers=1)
        logits, further = model(tokens(), next_ids=tokens(seed=1))
        (token_nll_sum(logits, tokens(seed=1)) + token_nll_sum(further, after_next(tokens(seed=1)))).backward()
        results.append((further, [p.grad for p in model.parameters()], read_counts(routers_of(model))))
    (further, gradients, load), *others = results
    for further_2, gradients_2, load_2 in others:
        assert torch.equal(further, further_2)
        assert torch.equal(load, load_2)
        assert all(torch.equal(one, two) for one, two in zip(gradients, gradients_2, strict=True))


def test_targets_of_the_mtp_layer_are_one_token_further() -> None:
    assert after_next(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]


def test_tied_embeddings_are_one_parameter_and_start_with_small_logits() -> None:
    model = build(tie_embeddings=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert abs(token_nll(model(tokens()), tokens(seed=1)).mean().item() - math.log(11)) < 0.7


def test_an_empty_batch_goes_forward_and_backward() -> None:
    model = build()
    token_nll_sum(model(tokens(0, 5)), tokens(0, 5)).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_float64_model_stays_float64_throughout() -> None:
    model = build().double()
    dtypes: set[torch.dtype] = set()

    def collect(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            dtypes.add(output.dtype)

    for module in model.modules():
        module.register_forward_hook(collect)
    loss = token_nll_sum(model(tokens()), tokens(seed=1))
    assert dtypes == {torch.float64}
    assert loss.dtype == torch.float64


def test_bf16_autocast_gives_fp32_logits_close_to_fp32_and_fp32_gradients() -> None:
    model = build()
    with torch.no_grad():
        exact = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
        loss = token_nll_sum(logits, tokens(seed=1))
    assert logits.dtype == loss.dtype == torch.float32
    assert (logits - exact).norm() < 0.05 * exact.norm()
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 tokens is longer than max_seq_len \(16\)"):
        build()(tokens(1, 17))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"hidden": 0}, r"hidden \(0\) must be at least 1"),
        ({"num_dense_layers": 4}, r"num_dense_layers \(4\) must be between 0 and num_layers \(3\)"),
        ({"hidden": 30}, r"hidden \(30\) must be a multiple of 2 \* num_heads \(2 \* 6\)"),
        ({"num_kv_heads": 4}, r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"),
        ({"head_dim": 3}, r"head_dim \(3\) must be even"),
        ({"partial_rotary_factor": 0.0}, r"partial_rotary_factor \(0.0\) must be above 0, at most 1"),
        ({"attention": "sparse"}, r"attention is 'sparse'; it must be one of grouped_query, latent"),
        ({"query_key_norm": "layer"}, r"query_key_norm is 'layer'; it must be one of none, head, all"),
        ({"clip_qkv": -1.0}, r"clip_qkv \(-1.0\) must be at least 0"),
        ({"sliding_window": -1}, r"sliding_window \(-1\) and full_attention_every \(0\) must be at least 0"),
        (
            {"sliding_window": 4, "num_mtp_layers": 1},
            r"sliding_window \(4\) must be 0 with latent attention or",
        ),
        ({"attention": "latent", "attention_sinks": True}, r"attention_sinks \(True\) has no effect on latent"),
        ({"attention": "latent", "attention_gate": True}, r"attention_gate \(True\) has no effect on latent"),
        ({"attention": "latent", "query_key_norm": "head"}, r"query_key_norm \(head\) has no effect on latent"),
        ({"attention": "latent", "partial_rotary_factor": 0.5}, r"partial_rotary_factor \(0.5\) has no effect on la"),
        ({"num_mtp_layers": 2}, r"num_mtp_layers \(2\) must be 0 or 1"),
        ({"rope_theta": 0.0}, r"rope_theta \(0.0\) must be above 0"),
        ({"norm_eps": float("nan")}, r"norm_eps \(nan\) must be above 0"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **override})


# --- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ep_size", [2, 3, 4])
@both_kinds
def test_initial_weights_are_the_same_at_any_ep_size(ep_size: int, settings: dict[str, Any]) -> None:
    whole = dict(build(**settings).named_parameters())
    for ep_rank in range(ep_size):
        shard = build(lambda rank=ep_rank: PlacedDispatcher(8, ep_size, rank), **settings)  # type: ignore[misc]
        owned = ExpertPlacement(8, ep_size).owned_by(ep_rank)
        experts = expert_parameters(shard)
        for name, parameter in shard.named_parameters():
            expected = whole[name][owned.start : owned.stop] if name in experts else whole[name]
            assert torch.equal(parameter, expected), name


def test_every_tensor_and_expert_has_its_own_weights_scaled_by_fan_in() -> None:
    model = build(hidden=48, dense_ffn_hidden=96)
    parameters = dict(model.named_parameters())
    experts = parameters["layers.1.moe.experts.gate_up_proj"]
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(experts, parameters["layers.2.moe.experts.gate_up_proj"])
    assert not torch.equal(
        experts, dict(build(hidden=48, seed=1).named_parameters())["layers.1.moe.experts.gate_up_proj"]
    )
    assert experts.std().item() == pytest.approx(48**-0.5, rel=0.05)
    # 6 projections write into the residual stream of 3 layers
    assert parameters["layers.0.ffn.down_proj.weight"].std().item() == pytest.approx((96 * 6) ** -0.5, rel=0.05)
    assert parameters["layers.0.attention.out_proj.weight"].std().item() == pytest.approx((48 * 6) ** -0.5, rel=0.05)
    assert parameters["token_embedding.weight"].std().item() == pytest.approx(1.0, rel=0.1)
    assert torch.equal(parameters["norm.weight"], torch.ones(48))
    zero = {name for name, parameter in build(**VARIANT).named_parameters() if not parameter.any()}
    moe, attention = "layers.1.moe", "layers.1.attention"
    assert zero >= {f"{moe}.router.gate_bias", f"{moe}.experts.down_proj_bias", f"{attention}.sinks"}
    assert all(name.endswith(("bias", "sinks")) for name in zero)


@both_kinds
def test_a_model_built_on_meta_equals_one_built_directly(settings: dict[str, Any]) -> None:  # B27
    direct = build(**settings)
    with torch.device("meta"):
        model = Decoder(ModelConfig(**SMALL | settings), lambda: LocalDispatcher(8))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:  # what to_empty may leave there
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    init_weights(model, seed=0)
    for (name, actual), expected in zip(model.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
    for router in routers_of(model).values():
        assert not any(buffer.any() for buffer in router.buffers())
    assert torch.equal(model(tokens()), direct(tokens()))


# --- recompute ---------------------------------------------------------------------------------------------------


@both_kinds
def test_recompute_changes_neither_outputs_nor_gradients_nor_names_nor_counts(  # B2, B28, parity 6
    settings: dict[str, Any],
) -> None:
    results = []
    for recompute in get_args(Recompute):
        model = build(recompute=recompute, **settings)
        logits = model(tokens())
        token_nll_sum(logits, tokens(seed=1)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((logits, gradients, read_counts(routers_of(model)), list(model.state_dict())))
    (logits, gradients, load, names), *others = results
    assert load.sum() == 2 * 14 * 2
    for logits_2, gradients_2, load_2, names_2 in others:
        assert torch.equal(logits, logits_2)
        assert gradients.keys() == gradients_2.keys()
        for name, gradient in gradients.items():
            assert gradient is not None
            assert torch.equal(gradient, gradients_2[name]), name  # type: ignore[arg-type]
        assert torch.equal(load, load_2)
        assert names == names_2


def test_recompute_keeps_fewer_activations_and_evaluates_alike() -> None:
    saved: dict[str, int] = {}
    for recompute in get_args(Recompute):
        model = build(recompute=recompute)
        sizes: list[int] = []

        def note_size(tensor: Tensor, kept: list[int] = sizes) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
            model(tokens())
        saved[recompute] = sum(sizes)
    assert saved["full"] < saved["none"] / 2
    assert saved["full"] < saved["experts"] < saved["attention"] < saved["none"]
    with torch.no_grad():
        assert torch.equal(build(recompute="full").eval()(tokens()), build().eval()(tokens()))
