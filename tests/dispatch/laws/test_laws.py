import math

import msgpack
import pytest
import torch

from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout


def _law(num_experts, rate=1e-3, law="sign", balanced=None):
    names = tuple(f"layer{index}" for index in range(len(num_experts)))
    layout = LoadLayout(names, tuple(num_experts), tuple(balanced or [True] * len(num_experts)))
    return Law(BalanceConfig(law=law, rate=rate), layout)


def test_golden_two_rank_case_gives_exactly_a_quarter():  # P10, P13: loads [0, 2] and [0, 0] at rate 0.25
    law = _law([2], rate=0.25)
    load = torch.tensor([0, 2]) + torch.tensor([0, 0])
    assert law.update(load, law.initial_state(), 0).bias_N.tolist() == [0.25, -0.25]


def test_sign_is_exact_where_bf16_flips_it():  # B1, P9
    # 64 ranks with 608..676 tokens for expert 0: sum 40,840 below the mean 40,960; bf16 sums gave 41,216, above it.
    per_rank = [608 + (index * 68) // 63 for index in range(64)]
    per_rank[0] += 40_840 - sum(per_rank)
    loads = torch.tensor([[count, 1280 - count] for count in per_rank])
    assert loads[:, 0].sum() == 40_840
    law = _law([2])
    biases = {
        law.update(loads[torch.randperm(64)].sum(0), law.initial_state(), 0).bias_N.numpy().tobytes() for _ in range(20)
    }
    (bias,) = biases
    assert torch.frombuffer(bytearray(bias), dtype=torch.float32)[0] > 0
    in_bf16 = torch.zeros((), dtype=torch.bfloat16)
    for count in per_rank:
        in_bf16 = in_bf16 + torch.tensor(count, dtype=torch.bfloat16)
    assert float(in_bf16) != 40_840  # the mistake that this guards against


def test_huge_counts_compare_exactly():  # P9: 2**53 + 1 is not a float64
    law = _law([2])
    big = 2**53
    assert law.update(torch.tensor([big + 1, big]), law.initial_state(), 0).bias_N.tolist() == pytest.approx(
        [-1e-3, 1e-3]
    )
    assert law.update(torch.tensor([big, big]), law.initial_state(), 0).bias_N.tolist() == [0.0, 0.0]


def test_overloaded_expert_goes_down_and_idle_one_up():  # B20
    law = _law([4], rate=0.1)
    bias = law.update(torch.tensor([9, 1, 1, 1]), law.initial_state(), 0).bias_N
    assert bias[0] < 0
    assert (bias[1:] > 0).all()


def test_bias_stays_centred_over_ten_thousand_steps():  # B31
    law = _law([64], rate=1e-3)
    state = law.initial_state()
    generator = torch.Generator().manual_seed(0)
    for step in range(10_000):
        # One hot expert: 63 go up and 1 goes down, so that an uncentred mean climbs by almost the rate each step.
        load = torch.randint(0, 50, (64,), generator=generator)
        load[step % 3] += 5_000
        state = law.update(load, state, step)
    assert abs(math.fsum(state.bias_N.tolist()) / 64) < 1e-6
    assert state.bias_N.abs().max() < 20


def test_centring_changes_no_choice():  # B31
    law = _law([8], rate=0.01)
    torch.manual_seed(0)
    state, uncentred = law.initial_state(), torch.zeros(8, dtype=torch.float64)
    scores = torch.rand(100, 8)
    for step in range(50):
        load = torch.bincount((scores.double() + uncentred).topk(2).indices.flatten(), minlength=8)
        uncentred += 0.01 * torch.sign(load.sum() - 8 * load)
        state = law.update(load, state, step)
    drift = uncentred.mean()
    torch.testing.assert_close(state.bias_N.double(), uncentred - drift, atol=1e-6, rtol=0)
    centred_choice = (scores.double() + state.bias_N.double()).topk(2).indices
    assert torch.equal(centred_choice, (scores.double() + uncentred).topk(2).indices)


def test_layers_differ_in_size_and_may_be_off():  # B9, B10
    law = _law([2, 4, 2], rate=0.5, balanced=[True, False, True])
    load = torch.tensor([3, 1, 9, 0, 0, 0, 1, 3])
    bias = law.update(load, law.initial_state(), 0).bias_N
    assert bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0.5, -0.5]


def test_a_model_without_moe_layers_has_an_empty_bias():
    law = _law([])
    assert law.update(torch.zeros(0, dtype=torch.int64), law.initial_state(), 0).bias_N.shape == (0,)


def test_a_law_is_pure():
    law = _law([4])
    state, load = law.initial_state(), torch.tensor([5, 0, 0, 0])
    first = law.update(load, state, 0)
    second = law.update(load, state, 0)
    assert torch.equal(first.bias_N, second.bias_N)
    assert state.bias_N.tolist() == [0.0] * 4
    assert load.tolist() == [5, 0, 0, 0]


def test_none_never_moves():
    law = _law([4], law="none")
    assert law.update(torch.tensor([5, 0, 0, 0]), law.initial_state(), 0).bias_N.tolist() == [0.0] * 4


def test_state_survives_the_wire_bit_for_bit():  # B26
    state = LawState(torch.tensor([0.1, -1e-30, 3.0]), {"momentum": torch.randn(3), "seen": torch.tensor([2**60])})
    back = LawState.from_wire(msgpack.unpackb(msgpack.packb(state.to_wire())))
    assert torch.equal(back.bias_N, state.bias_N)
    assert torch.equal(back.extras["momentum"], state.extras["momentum"])
    assert back.extras["seen"].tolist() == [2**60]


@pytest.mark.parametrize("packed", [["<f8", b"12345678"], ["<f4", b"123"], ["<f4", "text"]])
def test_a_malformed_state_is_refused(packed):
    with pytest.raises(ValueError, match="dtype"):
        LawState.from_wire({"bias": packed, "extras": {}})


def test_wrong_loads_are_refused():
    law = _law([4])
    with pytest.raises(ValueError, match="int64"):
        law.update(torch.zeros(4), law.initial_state(), 0)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        law.update(torch.zeros(5, dtype=torch.int64), law.initial_state(), 0)


@pytest.mark.parametrize(("fields", "said"), [({"law": "pid"}, "'pid'.*none.*sign"), ({"rate": -1.0}, "-1.0")])
def test_an_unknown_law_or_rate_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        BalanceConfig(**fields)
