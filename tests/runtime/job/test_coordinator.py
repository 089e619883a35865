"""The coordinator's policy, without Ray: versions, repetition, loss of memory, bad input."""

import torch

from dispatch.laws import BalanceConfig, Law, LawState
from dispatch.layout import LoadLayout
from runtime.job.coordinator import CoordinatorPolicy
from workers.control.wire import (
    BiasUpdate,
    LoadReport,
    Message,
    NeedState,
    Refusal,
    Seed,
    VersionedState,
    decode,
    encode,
    law_checksum,
)

LAYOUT = LoadLayout(names=("a", "b"), num_experts=(2, 3), balanced=(True, True))
CONFIG = BalanceConfig(law="sign", rate=0.25)
LAW = Law(CONFIG, LAYOUT)
START = VersionedState(0, LAW.initial_state())
LOADS = [torch.tensor(load) for load in ([0, 4, 1, 1, 4], [3, 1, 2, 2, 2], [2, 2, 6, 0, 0], [1, 3, 0, 3, 3])]


def _ask(policy: CoordinatorPolicy, step: int, base: VersionedState, load_N: torch.Tensor, *, seed: bool = False,
         run_id: str = "run", config: BalanceConfig = CONFIG) -> Message:  # fmt: skip
    return decode(policy.handle(encode(_report(step, base, load_N, seed=seed, run_id=run_id, config=config))))


def _report(step: int, base: VersionedState, load_N: torch.Tensor, *, seed: bool = False, run_id: str = "run",
            config: BalanceConfig = CONFIG) -> LoadReport:  # fmt: skip
    return LoadReport(
        run_id=run_id,
        step=step,
        base_version=base.version,
        base_checksum=base.checksum,
        law_checksum=law_checksum(config, LAYOUT),
        counts_M=load_N,
        seed=Seed(config=config, layout=LAYOUT, state=base.state) if seed else None,
    )


def _next(step: int, base: VersionedState, load_N: torch.Tensor) -> VersionedState:
    """What the law says: the oracle."""
    return VersionedState(base.version + 1, LAW.update(load_N, base.state, step))


def _held(answer: Message) -> VersionedState:
    assert isinstance(answer, BiasUpdate), answer
    return VersionedState(answer.version, answer.state)


def _same(one: VersionedState, other: VersionedState) -> bool:
    return (one.version, one.checksum) == (other.version, other.checksum)


def test_each_report_on_the_last_update_gives_the_next_one() -> None:  # P10, P16
    policy, base = CoordinatorPolicy("run"), START
    for step, load_N in enumerate(LOADS):
        expected = _next(step, base, load_N)
        base = _held(_ask(policy, step, base, load_N, seed=step == 0))
        assert _same(base, expected)
    assert policy.status() == {
        "run_id": "run", "reports": 4, "refused": 0, "reseeds": 0, "last_step": 3, "version": 4
    }  # fmt: skip


def test_the_first_update_is_the_hand_worked_one() -> None:  # P10: [0, 4] at rate 0.25 gives [+0.25, -0.25]
    first = _held(_ask(CoordinatorPolicy(), 0, START, LOADS[0], seed=True))
    # layer b: loads 1, 1, 4 with mean 2: +, +, - of 0.25, minus their mean of 0.25 / 3
    assert first.state.bias_N[:2].tolist() == [0.25, -0.25]
    assert torch.allclose(first.state.bias_N[2:], torch.tensor([1 / 6, 1 / 6, -1 / 3]), atol=1e-7)


def test_a_repeated_report_gets_the_same_bytes_and_moves_nothing() -> None:  # P16
    policy = CoordinatorPolicy()
    first = encode(_report(0, START, LOADS[0], seed=True))
    answer = policy.handle(first)
    assert policy.handle(first) == answer == policy.handle(encode(_report(0, START, LOADS[0])))
    base = _held(decode(answer))
    assert _same(_held(_ask(policy, 1, base, LOADS[1])), _next(1, base, LOADS[1]))


def test_a_skipped_step_is_computed_anew_from_the_old_base() -> None:  # B37
    policy = CoordinatorPolicy()
    _ask(policy, 0, START, LOADS[0], seed=True)  # its update is thrown away: the optimizer skipped step 0
    assert _same(_held(_ask(policy, 1, START, LOADS[1])), _next(1, START, LOADS[1]))


def test_a_late_report_is_not_answered_with_an_update_and_changes_nothing() -> None:  # P16
    policy = CoordinatorPolicy()
    one = _held(_ask(policy, 0, START, LOADS[0], seed=True))
    two = _held(_ask(policy, 1, one, LOADS[1]))
    assert _ask(policy, 0, START, LOADS[0]) == NeedState(step=0)
    assert _same(_held(_ask(policy, 2, two, LOADS[2])), _next(2, two, LOADS[2]))


def test_a_late_report_after_a_skip_cannot_smuggle_its_update_in() -> None:  # P16, B37
    policy = CoordinatorPolicy()
    _ask(policy, 0, START, LOADS[0], seed=True)
    kept = _held(_ask(policy, 1, START, LOADS[1]))  # step 0 was skipped
    _ask(policy, 0, START, LOADS[0])  # its report comes again: the coordinator now proposes the wrong version 1
    assert _ask(policy, 2, kept, LOADS[2]) == NeedState(step=2)  # the number agrees, the checksum does not
    assert _same(_held(_ask(policy, 2, kept, LOADS[2], seed=True)), _next(2, kept, LOADS[2]))


def test_a_restarted_coordinator_asks_for_the_state_and_goes_on_with_the_same_bits() -> None:  # P16
    base = START
    for step, load_N in enumerate(LOADS):
        policy = CoordinatorPolicy()  # dies before every step
        assert _ask(policy, step, base, load_N) == NeedState(step=step)
        expected = _next(step, base, load_N)
        base = _held(_ask(policy, step, base, load_N, seed=True))
        assert _same(base, expected)
    assert policy.status()["reseeds"] == 0


def test_a_run_that_goes_back_to_a_checkpoint_is_taken_back() -> None:
    policy, base = CoordinatorPolicy(), START
    for step, load_N in enumerate(LOADS):
        base = _held(_ask(policy, step, base, load_N, seed=step == 0))
    again = _held(_ask(policy, 0, START, LOADS[3], seed=True))
    assert _same(again, _next(0, START, LOADS[3]))
    assert policy.status()["reseeds"] == 1 and policy.status()["version"] == 1


def test_another_rate_is_another_law_even_on_the_same_base() -> None:
    policy = CoordinatorPolicy()
    _ask(policy, 0, START, LOADS[0], seed=True)
    other = BalanceConfig(law="sign", rate=0.5)
    assert _ask(policy, 0, START, LOADS[0], config=other) == NeedState(step=0)
    assert _held(_ask(policy, 0, START, LOADS[0], config=other, seed=True)).state.bias_N[0] == 0.5


def test_bad_input_is_refused_with_its_reason_and_changes_nothing() -> None:
    policy = CoordinatorPolicy("run")
    base = _held(_ask(policy, 0, START, LOADS[0], seed=True))
    too_short = LawState(torch.zeros(4))
    bad = {
        b"junk": "does not match its checksum",
        encode(NeedState(step=1)): "not for the coordinator",
        encode(_report(1, base, LOADS[1], run_id="other")): "serves run 'run'",
        encode(_report(1, base, torch.tensor([1, 2]))): r"shape (5,)",
        encode(_report(1, VersionedState(7, too_short), LOADS[1], seed=True)): "not one of law 'sign'",
        encode(
            LoadReport(
                run_id="run",
                step=1,
                base_version=9,
                base_checksum=1,
                law_checksum=2,
                counts_M=LOADS[1],
                seed=Seed(config=CONFIG, layout=LAYOUT, state=base.state),
            )
        ): "does not match the checksums",
    }
    for raw, reason in bad.items():
        answer = decode(policy.handle(raw))
        assert isinstance(answer, Refusal) and reason in answer.reason, answer
    assert policy.status()["refused"] == len(bad) and policy.status()["reports"] == 1
    assert _same(_held(_ask(policy, 1, base, LOADS[1])), _next(1, base, LOADS[1]))
