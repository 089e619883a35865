"""Each law that comes with us: by hand, as a pure function with a state, and in closed loop on a simulated router."""

import math

import msgpack
import numpy as np
import pytest
import torch

from dispatch.config import RouterConfig
from dispatch.errors import InvalidValue
from dispatch.laws import LAWS, BalanceConfig, Law, LawState, register_law
from dispatch.layout import LoadLayout
from dispatch.routing.selection import ordered_topk
from dispatch.routing.statistics import HISTOGRAM_BINS, CutoffHistogram, RouterChoice
from runtime.commands.replay.play import LawSimulator, max_vio_by_step, simulate_laws
from runtime.commands.replay.simulation import RouterSimulation

OURS = [
    "adaptive", "multiplicative", "newton", "none", "proportional", "quantile", "rms", "sign", "smebu", "warm",
]  # fmt: skip


def _law(name, num_experts=(4,), balanced=None, **settings):
    names = tuple(f"layer{index}" for index in range(len(num_experts)))
    layout = LoadLayout(names, tuple(num_experts), tuple(balanced or [True] * len(num_experts)))
    return Law(BalanceConfig(law=name, **settings), layout)


def _counts(law, seed):
    """Plausible counts of 40 tokens that choose 2 experts a layer."""
    generator = torch.Generator().manual_seed(seed)
    loads, statistics = [], []
    for num_experts in law.layout.num_experts:
        scores_TE = torch.rand(40, num_experts, generator=generator) + torch.arange(num_experts) / num_experts / 4
        routing = RouterChoice(
            scores_TE, scores_TE, ordered_topk(scores_TE, 2), torch.zeros(num_experts), torch.tensor(0.1)
        )
        loads.append(torch.bincount(routing.topk_ids_TK.flatten(), minlength=num_experts))
        if law.statistic is not None:
            statistics.append(law.statistic.count(routing, None).flatten())
    return torch.cat([*loads, *statistics])


def _same(a: LawState, b: LawState) -> bool:
    return a.bias_N.equal(b.bias_N) and all(a.extras[name].equal(b.extras[name]) for name in {*a.extras, *b.extras})


def test_these_laws_come_with_us():
    assert {name for name, entry in LAWS.items() if entry.rule.__module__.startswith("dispatch.")} == set(OURS)


# Loads 6, 2, 4, 4 of a mean of 4: v = -0.5, 0.5, 0, 0.
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("none", {}, [0, 0, 0, 0]),
        ("sign", {"rate": 0.1}, [-0.1, 0.1, 0, 0]),
        ("proportional", {"rate": 0.1}, [-0.05, 0.05, 0, 0]),
        ("multiplicative", {"rate": 0.1}, [-0.1, 0.1, 0, 0]),
        ("rms", {"rate": 0.1}, [-0.1 * math.sqrt(2), 0.1 * math.sqrt(2), 0, 0]),
        ("smebu", {"rate": 0.1, "options": {"beta": 0.75, "kappa": 2.0}},
         [-0.025 * math.tanh(1), 0.025 * math.tanh(1), 0, 0]),
    ],
)  # fmt: skip
def test_a_first_step_by_hand(name, settings, expected):
    law = _law(name, **settings)
    bias_N = law.update(torch.tensor([6, 2, 4, 4]), law.initial_state(), 1).bias_N
    assert bias_N.tolist() == pytest.approx(expected, abs=1e-7)


def test_smebu_keeps_its_momentum():
    law = _law("smebu", rate=0.1)
    state = law.update(torch.tensor([6, 2, 4, 4]), law.initial_state(), 1)
    after = law.update(torch.tensor([4, 4, 4, 4]), state, 2).bias_N  # nothing lacks any more
    first = 0.05 * math.tanh(1)
    assert after.tolist() == pytest.approx([-1.5 * first, 1.5 * first, 0, 0], abs=1e-7)


def test_multiplicative_factors_keep_a_mean_of_one_and_stay_positive():
    law = _law("multiplicative", rate=0.4)
    state = law.initial_state()
    for step in range(1, 30):
        state = law.update(torch.tensor([9, 1, 1, 1]), state, step)
    factors = 1 + state.bias_N.double()
    assert factors.mean() == pytest.approx(1, abs=1e-6)
    assert (factors > 0).all() and factors[0] < 0.01


def test_a_newton_step_by_hand():
    # Width 0.02, near 10, 10, 10, 2: slopes 10 / 0.04 = 250 tokens a unit. Lacking 1: a step of 1 / 250 = 0.004.
    law = _law("newton", rate=1.0)
    counts = torch.tensor([5, 3, 4, 4, 10, 10, 10, 2])
    state = law.update(counts, law.initial_state(), 1)
    assert state.bias_N.tolist() == pytest.approx([-0.004, 0.004, 0, 0], abs=1e-8)
    # The next width is that which has 0.8 of the load near: 0.02 * sqrt(0.8 * 16 / 32).
    assert float(state.extras["statistic_scale"]) == pytest.approx(0.02 * math.sqrt(0.4))


def test_a_newton_step_is_no_longer_than_its_statistic_can_tell():
    law = _law("newton", rate=1.0)
    state = law.update(torch.tensor([1600, 0, 0, 0, 0, 0, 0, 0]), law.initial_state(), 1)
    assert float(state.bias_N.max() - state.bias_N.min()) <= 2 * 2.5 * 0.08 + 1e-6  # the width has grown fourfold
    assert float(state.extras["statistic_scale"]) == pytest.approx(0.08)


def test_quantile_gives_every_expert_the_mean_load_at_the_cutoffs_of_the_step():
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(4000, 8, generator=generator) ** torch.arange(1, 9)
    routing = RouterChoice(scores_TE, scores_TE, ordered_topk(scores_TE, 2), torch.zeros(8), torch.tensor(0.0))
    law = _law("quantile", (8,))
    load_E = torch.bincount(routing.topk_ids_TK.flatten(), minlength=8)
    statistic = CutoffHistogram().count(routing, None).flatten()
    bias_E = law.update(torch.cat([load_E, statistic]), law.initial_state(), 1).bias_N
    # Exactly, without bins: expert j gets the tokens whose cutoff - score is below its bias.
    cutoff_T1 = scores_TE.sort(1, descending=True).values[:, 2:3]
    exact_E = (cutoff_T1 - scores_TE).sort(0).values[1000]  # 4000 * 2 / 8 tokens
    assert bias_E.tolist() == pytest.approx((exact_E - exact_E.mean()).tolist(), abs=2 * 2 / HISTOGRAM_BINS)


def test_adaptive_takes_a_whole_step_first_shrinks_it_in_noise_and_starts_anew_at_a_shift():
    law = _law("adaptive")
    state, gains = law.initial_state(), []
    for step in range(1, 30):
        lack = [2, -2, 1, -1] if step % 2 else [-2, 2, -1, 1]  # each step the opposite of the one before
        if step == 25:
            lack = [20, -10, -5, -5]
        state = law.update(torch.tensor([30 - each for each in lack] + [40] * 4), state, step)
        gains.append(float(state.extras["gain"]))
    assert gains[0] == 1.0 and gains[1] < 0.3
    assert gains[23] == pytest.approx(0.1) and gains[24] == 1.0
    steady = _law("adaptive")
    state = steady.initial_state()
    for step in range(1, 30):
        state = steady.update(torch.tensor([31, 29, 30, 30, 40, 40, 40, 40]), state, step)
    assert float(state.extras["gain"]) == 1.0  # always the same lack: the bias lags, and the steps stay whole


def test_warm_jumps_then_steps_and_jumps_again_after_a_shift():
    trace = RouterSimulation(seed=0, num_steps=24, shift_step=15, router=RouterConfig(num_experts=16, top_k=2))
    player = LawSimulator(BalanceConfig(law="warm", rate=1e-4), trace.layout, trace.router)
    for step in trace.steps:
        player.step(step, trace.scores(step))
    moved = np.abs(np.diff(player.result().bias, axis=0)).max(1)
    assert (moved[:3] > 0.005).all()
    assert (moved[3:14] < 3e-4).all()
    assert moved[14] > 0.05 and (moved[18:] < 3e-4).all()


@pytest.mark.parametrize("name", OURS)
def test_every_law_is_pure_centred_and_leaves_frozen_and_idle_layers_alone(name):  # B9, B10, B31
    law = _law(name, (4, 6, 4, 4), [True, False, True, True])
    counts_M = _counts(law, 0)
    counts_M[14:18] = 0  # the last layer saw no token
    state = law.update(_counts(law, 1), law.initial_state(), 1)
    kept = LawState(state.bias_N.clone(), {key: value.clone() for key, value in state.extras.items()})
    before = counts_M.clone()
    first, second = law.update(counts_M, state, 2), law.update(counts_M, state, 2)
    assert _same(first, second) and _same(state, kept) and before.equal(counts_M)
    assert not first.bias_N[4:10].any()
    assert first.bias_N[14:].equal(state.bias_N[14:])
    for where in law.layout.slices:
        assert abs(math.fsum(first.bias_N[where].tolist())) < 1e-6
    assert first.bias_N.dtype == torch.float32
    assert {value.dtype for value in first.extras.values()} <= {torch.float32}
    if name != "none":
        assert not first.bias_N.equal(state.bias_N)


@pytest.mark.parametrize("name", OURS)
def test_a_law_that_travelled_goes_on_as_if_it_had_not(name):  # B26
    law = _law(name, (4, 6))
    state = travelled = law.initial_state()
    for step in range(1, 9):
        counts_M = _counts(law, step)
        state = law.update(counts_M, state, step)
        travelled = LawState.from_wire(msgpack.unpackb(msgpack.packb(travelled.to_wire())))
        travelled = _law(name, (4, 6)).update(counts_M, travelled, step)
    assert _same(state, travelled)


@pytest.mark.parametrize("name", sorted({*OURS} - {"none"}))
def test_in_closed_loop_every_law_balances_and_holds_without_swinging(name):  # P15
    rates = {"sign": 0.01, "multiplicative": 0.02, "proportional": 0.02, "rms": 0.01, "smebu": 0.02}
    trace = RouterSimulation(
        seed=3, num_steps=60, shift_step=None, router=RouterConfig(num_experts=16, top_k=2), num_sequences=64
    )
    player = LawSimulator(BalanceConfig(law=name, rate=rates.get(name)), trace.layout, trace.router)
    for step in trace.steps:
        player.step(step, trace.scores(step))
    simulated = player.result()
    vio = max_vio_by_step(simulated.counts, trace.layout.slices)
    assert vio[0] > 1.5  # without a bias
    assert vio[30:].mean() < 0.5 and vio[30:].max() < 1.0
    swing = np.abs(np.diff(simulated.bias[30:], axis=0)).max()
    # Half or the whole of a step follows the chance of one batch: these two swing with it.
    assert swing < (0.35 if name in ("newton", "quantile") else 0.15) * np.ptp(simulated.bias[-1])
    assert np.abs(simulated.bias.sum(1)).max() < 1e-5
    assert (simulated.regret >= 0).all() and simulated.regret[-1] < 0.1


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_adaptive_finds_the_scale_of_the_scores_by_itself(score):
    router = RouterConfig(num_experts=32, top_k=4, score=score)
    trace = RouterSimulation(seed=4, num_steps=40, shift_step=None, router=router, num_sequences=64)
    player = LawSimulator(BalanceConfig(law="adaptive"), trace.layout, trace.router)
    for step in trace.steps:
        player.step(step, trace.scores(step))
    assert max_vio_by_step(player.result().counts, trace.layout.slices)[15:].mean() < 0.5


def test_every_law_that_is_registered_for_group_limits_balances_them():
    router = RouterConfig(num_experts=32, top_k=6, num_groups=8, groups_kept=3, scores_per_group=2)
    trace = RouterSimulation(seed=5, num_steps=40, shift_step=None, router=router, num_sequences=64)
    names = [name for name in OURS if LAWS[name].group_limited]
    # Laws whose step is fixed need a larger one than their own to arrive within 40 steps.
    rates = dict.fromkeys(("sign", "multiplicative", "rms", "smebu"), 0.02) | {"proportional": 0.05}
    laws = {name: BalanceConfig(law=name, rate=rates.get(name)) for name in names}
    vio = {
        name: max_vio_by_step(simulated.counts, trace.layout.slices)[20:].mean()
        for name, simulated in simulate_laws(trace, laws).items()
    }
    assert vio.pop("none") > 1.2
    assert all(each < 0.5 for each in vio.values()), vio


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [0.1, 0.1, 0.1]),
        ({"schedule": "linear", "horizon": 100}, [0.099, 0.05, 0.0]),
        ({"schedule": "cosine", "horizon": 100}, [0.1 * (1 + math.cos(math.pi * 0.01)) / 2, 0.05, 0.0]),
        ({"zero_last": 0.2, "horizon": 100}, [0.1, 0.1, 0.0]),
        ({"zero_last": 0.2, "schedule": "linear", "horizon": 100}, [0.1 * (1 - 1 / 80), 0.1 * 30 / 80, 0.0]),
        ({"zero_last": 1.0, "horizon": 100}, [0.0, 0.0, 0.0]),
    ],
)
def test_the_rate_follows_its_schedule(settings, rates):
    config = BalanceConfig(law="sign", rate=0.1, **settings)
    assert [config.rate_at(step) for step in (1, 50, 100)] == pytest.approx(rates)


@pytest.mark.parametrize("name", OURS)
def test_a_rate_of_zero_moves_nothing_at_all(name):
    law = _law(name, horizon=10, zero_last=0.5)
    state = law.update(_counts(law, 1), law.initial_state(), 1)
    assert _same(law.update(_counts(law, 2), state, 5), state)
    if name != "none":
        assert not _same(law.update(_counts(law, 2), state, 4), state)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"law": "smebu", "options": {"gamma": 1.0}}, "'gamma'.*knows beta, kappa"),
        ({"law": "sign", "options": {"beta": 1.0}}, "'sign' has no options"),
        ({"law": "smebu", "options": {"beta": math.nan}}, "beta.*finite"),
        ({"law": "smebu", "options": {"beta": True}}, "beta.*finite"),
        ({"law": "smebu", "options": {"beta": 10**400}}, "beta.*finite"),  # larger than every float
        ({"options": 3}, "names and numbers"),
        ({"law": "x" * 1000}, "^.{,300}$"),
        ({"schedule": "step"}, "'step'.*constant, linear or cosine"),
        ({"zero_last": 1.5}, r"1.5.*between 0 and 1"),
        ({"horizon": -1}, "-1.*whole number"),
        ({"rate": math.inf}, "inf.*finite"),
        ({"module": "no_such_module_at_all"}, "no_such_module_at_all.*PYTHONPATH"),
    ],
)
def test_wrong_settings_are_named_with_the_way_out(settings, said):
    with pytest.raises(ValueError, match=said):
        BalanceConfig(**settings)


def test_a_schedule_without_a_length_is_refused_before_the_first_step():
    with pytest.raises(InvalidValue, match=r"balance\.horizon"):
        _law("sign", schedule="linear")


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="'sign' is registered already"):
        register_law("sign", rate=1.0)(lambda _load, state, _rate: state)
