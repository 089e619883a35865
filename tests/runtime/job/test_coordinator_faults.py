"""The real coordinator actor, killed at every point of the exchange, too slow, or sent nonsense: not one bit changes.

One actor for all: each test is a run of a real control loop that starts anew, with another law.
"""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ray.session import RaySession
from dispatch.laws import LAWS, BalanceConfig, Law
from tests.runtime.job.failing_coordinator import COMPUTED, LIMIT_S, RECEIVED, SLOW, FailingCoordinator, Switch
from tests.workers.control.control_ranks import LAYOUT, NO_FLOATS, NO_SUMS, LiveBias
from tests.workers.control.wire_fuzz import hostile, law_of, report_of
from workers.control.loop import ControlLoop, StepControl
from workers.control.wire import BiasUpdate, NeedState, Refusal, VersionedState, decode, encode


@pytest.fixture(scope="module")
def coordinator(ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingCoordinator]:
    failing = FailingCoordinator.start(tmp_path_factory.mktemp("plan"))
    failing.status()
    yield failing
    ray.kill(failing.actor)


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """This process as the only rank of a group."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _counts(law: Law, step: int) -> torch.Tensor:
    return torch.randint(0, 50, (law.num_counts,), generator=torch.Generator().manual_seed(step))


class _Run:
    """A run that compares each step with the plain law."""

    def __init__(self, name: str, switch: Switch) -> None:
        self.model, self.law = LiveBias(), Law(BalanceConfig(law=name), LAYOUT)
        self.loop: ControlLoop = self.model.loop(switch, config=self.law.config, timeout_s=LIMIT_S)
        self.expected, self.num_steps = self.law.initial_state(), 0
        self.events: list[str] = []

    def step(self) -> StepControl:
        step, self.num_steps = self.num_steps, self.num_steps + 1
        counts_M = _counts(self.law, step)
        self.loop.begin_step(step, counts_M, NO_SUMS, NO_FLOATS, NO_SUMS)
        control = self.loop.finish_step(apply=True)
        self.expected = self.law.update(counts_M, self.expected, step)
        assert VersionedState(0, self.loop.state()[1]).checksum == VersionedState(0, self.expected).checksum
        assert self.model.bias_N.equal(self.expected.bias_N) and self.loop.state()[0] == self.num_steps
        self.events += [event["event"] for event in control.events]
        return control

    def until(self, event: str) -> None:
        give_up = time.monotonic() + LIMIT_S
        while event not in self.events:
            assert time.monotonic() < give_up, self.events
            self.step()
            time.sleep(0.02)  # the forward and backward that the control path hides behind


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ("on the way", "sign"),
        ("received", "newton"),
        pytest.param("computed", "smebu", marks=pytest.mark.slow),
        pytest.param("replied", "quantile", marks=pytest.mark.slow),
        pytest.param("idle", "rms", marks=pytest.mark.slow),
        ("again as soon as it is back", "newton"),
    ],
)
def test_killed_at_any_point_it_changes_no_bit_and_loses_no_step(  # P13, P16
    point: str, name: str, coordinator: FailingCoordinator, alone: None
) -> None:
    switch = Switch(coordinator.client())
    run = _Run(name, switch)
    with run.loop:
        for _ in range(3):
            run.step()
        before = coordinator.status()
        assert run.events == [] and (before["last_step"], before["version"]) == (2, 3)
        if point == "on the way":  # sent, never read
            switch.instead = coordinator.kill_on_the_way
        elif point == "replied":  # rank 0 has the answer, and the next report finds nobody
            switch.after = lambda: os.kill(before["pid"], signal.SIGKILL)
        elif point == "idle":  # back before anyone asks, and empty
            os.kill(before["pid"], signal.SIGKILL)
            assert coordinator.status()["version"] == -1
        else:
            coordinator.plan(COMPUTED if point == "computed" else RECEIVED)
        run.step()
        if point == "again as soon as it is back":
            coordinator.plan(RECEIVED)
            while coordinator.planned(RECEIVED):
                run.step()
                time.sleep(0.02)
            assert run.events == ["coordinator_lost"]
        if point != "idle":
            run.until("coordinator_back")
        for _ in range(2):
            run.step()
    assert run.events == ([] if point == "idle" else ["coordinator_lost", "coordinator_back"])
    after = coordinator.status()
    # It is another process, and it is the one that answers again.
    assert after["pid"] != before["pid"] and after["last_step"] == run.num_steps - 1
    assert after["version"] == run.num_steps


def test_a_late_answer_is_waited_for_within_the_bound_and_never_taken_for_another_step(  # P16
    coordinator: FailingCoordinator, alone: None
) -> None:
    run = _Run("smebu", Switch(coordinator.client(timeout_s=0.3)))
    with run.loop:
        run.step()
        coordinator.plan(SLOW)
        began = time.monotonic()
        control = run.step()
        assert 0.25 < time.monotonic() - began < 0.3 + 1.0  # one time-out: the law answers in its place
        assert run.events == ["coordinator_lost"] and "Timeout" in control.events[0]["reason"]
        began = time.monotonic()
        run.step()  # a pause of one step: nobody asks, nobody waits
        assert time.monotonic() - began < 0.25
        coordinator.cancel(SLOW)
        # Its answers to steps 1 and 3 are late, if it was asked again; the steps from here on get their own.
        run.until("coordinator_back")
        for _ in range(3):
            run.step()
    status = coordinator.status()
    assert run.events == ["coordinator_lost", "coordinator_back"]
    assert (status["last_step"], status["version"]) == (run.num_steps - 1, run.num_steps)


def test_an_answer_that_is_just_in_time_is_taken(coordinator: FailingCoordinator, alone: None) -> None:
    switch = Switch(coordinator.client(timeout_s=LIMIT_S))
    run = _Run("sign", switch)

    def slowly(raw: bytes) -> bytes:
        coordinator.plan(SLOW)
        reference = coordinator.actor.handle.remote(raw)
        time.sleep(0.2)
        coordinator.cancel(SLOW)
        answer: bytes = ray.get(reference, timeout=LIMIT_S)
        return answer

    with run.loop:
        switch.instead = slowly
        run.step()
        run.step()
    assert run.events == [] and coordinator.status()["last_step"] == 1


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(LAWS)))
def test_nonsense_neither_ends_the_actor_nor_moves_the_next_bias(  # P16
    coordinator: FailingCoordinator, data: st.DataObject, name: str
) -> None:
    law, base = law_of(name), VersionedState(0, law_of(name).initial_state())
    good = report_of(law, 0, base)
    noise = data.draw(st.lists(hostile([encode(good)]), min_size=4, max_size=12))
    pid = coordinator.status()["pid"]
    for answer in ray.get([coordinator.actor.handle.remote(raw) for raw in noise], timeout=LIMIT_S):
        assert isinstance(decode(answer), (BiasUpdate, NeedState, Refusal))
    again = decode(coordinator.client(LIMIT_S)(encode(good)))
    assert isinstance(again, BiasUpdate), again
    expected = VersionedState(1, law.update(good.counts_M, base.state, 0))
    assert VersionedState(again.version, again.state).checksum == expected.checksum
    assert coordinator.status()["pid"] == pid
