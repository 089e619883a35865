"""The leader under answers that no coordinator should give: its update is that of the plain law, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dispatch.laws import LAWS, Law, LawState
from runtime.job.coordinator import CoordinatorPolicy
from tests.workers.control.wire_fuzz import VALUES, any_of, counts_of, damaged, law_of, report_of
from workers.control.leader import Leader
from workers.control.wire import BiasUpdate, NeedState, Refusal, VersionedState, encode


def _messages(law: Law, num_steps: int) -> list[bytes]:
    """Answers of a good coordinator to a run whose every step is skipped once, its reports, and what else there is."""
    policy, messages = CoordinatorPolicy(), []

    def listening(raw: bytes) -> bytes:
        messages.extend([policy.handle(raw), raw])
        return messages[-2]

    leader, base = Leader(run_id="run", law=law, coordinator=listening), VersionedState(0, law.initial_state())
    for step in range(num_steps):
        leader.next_update(step + num_steps, base, counts_of(law, step + num_steps))
        update, _ = leader.next_update(step, base, counts_of(law, step))
        base = VersionedState(update.version, update.state)
    return [*messages, encode(NeedState(step=1)), encode(Refusal(reason="no"))]


# Made once: hypothesis draws from them in every example.
OTHERS = {name: _messages(law_of(name), 4) for name in LAWS}


@given(st.data(), st.sampled_from(sorted(LAWS)))
def test_no_answer_moves_the_bias_off_the_law(data: st.DataObject, name: str) -> None:  # P16
    law = law_of(name)
    base = expected = VersionedState(0, law.initial_state())
    for step in range(4):
        good = CoordinatorPolicy().handle(encode(report_of(law, step, base)))
        lines = any_of(damaged([good]), damaged([good, *OTHERS[name]]), VALUES)  # the last is not even bytes
        # A new leader asks at every step; an old one would pause after the first bad answer.
        leader = Leader(run_id="run", law=law, coordinator=lambda _, lines=lines: data.draw(lines))
        update, events = leader.next_update(step, base, counts_of(law, step))
        assert [event["event"] for event in events] in ([], ["coordinator_lost"])
        base = VersionedState(update.version, update.state)
        expected = VersionedState(step + 1, law.update(counts_of(law, step), expected.state, step))
        assert (update.step, base.version, base.checksum) == (step, expected.version, expected.checksum)
        assert base.state.bias_N.numpy().tobytes() == expected.state.bias_N.numpy().tobytes()


@given(st.data(), st.sampled_from(["newton", "smebu", "sign"]))
def test_a_run_through_good_and_bad_answers_is_that_of_the_law(data: st.DataObject, name: str) -> None:  # P16
    law, policy = law_of(name), CoordinatorPolicy()
    damage = damaged(OTHERS[name])

    def flaky(raw: bytes) -> bytes:
        way = data.draw(st.sampled_from(["good", "good", "twice", "damaged", "forgets"]))
        if way == "damaged":
            return data.draw(damage)
        if way == "twice":
            policy.handle(raw)
        if way == "forgets":
            policy.__init__()  # type: ignore[misc]
        return policy.handle(raw)

    leader, base, state = (
        Leader(run_id="run", law=law, coordinator=flaky),
        VersionedState(0, law.initial_state()),
        law.initial_state(),
    )
    for step in range(12):
        update, _ = leader.next_update(step, base, counts_of(law, step))
        base, state = VersionedState(update.version, update.state), law.update(counts_of(law, step), state, step)
        assert base.checksum == VersionedState(base.version, state).checksum


@pytest.mark.parametrize("name", ["", "bias"])
def test_no_extra_can_pass_for_the_bias(name: str) -> None:  # its length was looked up under the name of the extra
    law = law_of("sign")
    forged = LawState(torch.zeros(2), {name: torch.zeros(law.layout.total)})
    answer = encode(BiasUpdate(step=0, version=1, state=forged))
    base = VersionedState(0, law.initial_state())
    leader = Leader(run_id="run", law=law, coordinator=lambda _: answer)
    update, events = leader.next_update(0, base, counts_of(law, 0))
    assert len(update.state.bias_N) == law.layout.total and "another law" in events[0]["reason"]


def test_no_flipped_bit_of_an_answer_reaches_the_bias() -> None:
    law = law_of("newton")
    base = VersionedState(0, law.initial_state())
    good = CoordinatorPolicy().handle(encode(report_of(law, 0, base)))
    expected = VersionedState(1, law.update(counts_of(law, 0), base.state, 0)).checksum
    for at in range(8 * len(good)):
        answer = bytearray(good)
        answer[at // 8] ^= 1 << at % 8
        leader = Leader(run_id="run", law=law, coordinator=lambda _, answer=answer: bytes(answer))
        update, events = leader.next_update(0, base, counts_of(law, 0))
        assert VersionedState(update.version, update.state).checksum == expected and len(events) == 1, at
