"""The coordinator's policy under bytes that nobody should send: it answers all, and the next good report as ever."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dispatch.laws import LAWS, BalanceConfig, Law
from runtime.job.coordinator import CoordinatorPolicy
from tests.workers.control.wire_fuzz import LAYOUT, counts_of, hostile, law_of, report_of
from workers.control.leader import Leader
from workers.control.wire import BiasUpdate, NeedState, Refusal, VersionedState, decode, encode

ANSWERS = (BiasUpdate, NeedState, Refusal)


def _next(law: Law, step: int, base: VersionedState) -> VersionedState:
    """The oracle."""
    return VersionedState(base.version + 1, law.update(counts_of(law, step), base.state, step))


def _bits(state: VersionedState) -> tuple[int, int, bytes]:
    return state.version, state.checksum, state.state.bias_N.numpy().tobytes()


@given(st.data(), st.sampled_from(sorted(LAWS)))
def test_no_bytes_crash_the_coordinator_or_move_the_next_bias(data: st.DataObject, name: str) -> None:  # P16
    law = law_of(name)
    policy = CoordinatorPolicy("run")
    leader = Leader(run_id="run", law=law, coordinator=policy.handle)
    base, messages = VersionedState(0, law.initial_state()), []
    for step in range(3):
        messages += [encode(report_of(law, step, base)), encode(report_of(law, step, base, seed=None))]
        expected = _next(law, step, base)
        update, events = leader.next_update(step, base, counts_of(law, step))
        # No event: it was the coordinator that answered, and not the leader's own law in its place.
        assert _bits(VersionedState(update.version, update.state)) == _bits(expected) and not events
        base = expected
        for raw in data.draw(st.lists(hostile(messages), max_size=4)):
            assert isinstance(decode(policy.handle(raw)), ANSWERS)


@given(st.data(), st.sampled_from(sorted(LAWS)))
def test_a_coordinator_that_heard_nonsense_first_costs_no_bit(data: st.DataObject, name: str) -> None:  # P16
    law = law_of(name)
    policy = CoordinatorPolicy("run")
    base = VersionedState(0, law.initial_state())
    messages = [encode(report_of(law, 0, base))]
    for raw in data.draw(st.lists(hostile(messages), min_size=1, max_size=4)):
        assert isinstance(decode(policy.handle(raw)), ANSWERS)
    leader = Leader(run_id="run", law=law, coordinator=policy.handle)
    update, _ = leader.next_update(1, base, counts_of(law, 1))
    assert _bits(VersionedState(update.version, update.state)) == _bits(_next(law, 1, base))


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_damaged_first_message_changes_nothing(place: int, new: bytes) -> None:
    law = law_of("sign")
    base = VersionedState(0, law.initial_state())
    good, policy = encode(report_of(law, 0, base)), CoordinatorPolicy()
    before = policy.status()
    bad = bytearray(good)
    at = place % len(bad)
    bad[at : at + len(new)] = new
    if bytes(bad) == good:
        return
    assert isinstance(decode(policy.handle(bytes(bad))), Refusal)
    assert policy.status() == {**before, "refused": 1}
    # As one that heard nothing before: it does not even have a law.
    assert isinstance(decode(policy.handle(encode(report_of(law, 0, base, seed=None)))), NeedState)
    assert isinstance(decode(policy.handle(good)), BiasUpdate)


def test_a_coordinator_serves_the_run_it_was_started_for_whoever_asks_first() -> None:
    law = law_of("sign")
    base = VersionedState(0, law.initial_state())
    policy = CoordinatorPolicy("run")
    answer = decode(policy.handle(encode(report_of(law, 0, base, run_id="other"))))
    assert isinstance(answer, Refusal) and "serves run 'run', not 'other'" in answer.reason
    assert policy.status()["reports"] == 0
    assert isinstance(decode(policy.handle(encode(report_of(law, 0, base)))), BiasUpdate)


def test_numbers_that_overflow_the_law_are_refused() -> None:
    law = Law(BalanceConfig(law="sign", rate=1.7e308), LAYOUT)  # two steps up: their sum is no float64
    report = report_of(
        law, 0, VersionedState(0, law.initial_state()), counts_M=torch.tensor([0, 0, 9, 9, 1, 1, 0, 0, 0])
    )
    answer = decode(CoordinatorPolicy().handle(encode(report)))
    assert isinstance(answer, Refusal) and "overflow" in answer.reason
