"""The coordinator as a Ray actor: killed in mid-run, it comes back empty and the bias is that of an undisturbed run."""

import os
import pickle
import signal
import time

import ray
import torch

from cluster.ray.session import RaySession
from dispatch.laws import BalanceConfig, Law
from dispatch.layout import LoadLayout
from runtime.job.coordinator import CoordinatorClient, start_coordinator
from workers.control.leader import Leader
from workers.control.wire import VersionedState

LAYOUT = LoadLayout(names=("a", "b"), num_experts=(8, 16), balanced=(True, True))
CONFIG = BalanceConfig(law="sign", rate=0.01)


def _load(step: int) -> torch.Tensor:
    return torch.randint(0, 50, (LAYOUT.total,), generator=torch.Generator().manual_seed(step))


# P16
def test_a_killed_coordinator_comes_back_and_the_bias_does_not_change_by_a_bit(ray_session: RaySession) -> None:
    actor = start_coordinator("run")
    try:
        pid = ray.get(actor.status.remote(), timeout=300)["pid"]
        client = pickle.loads(pickle.dumps(CoordinatorClient(actor, timeout_s=5.0)))  # as it travels into a worker
        leader = Leader(run_id="run", law=Law(CONFIG, LAYOUT), coordinator=client)
        law = Law(CONFIG, LAYOUT)
        base, expected = VersionedState(0, law.initial_state()), law.initial_state()
        events, step = [], 0
        give_up = time.monotonic() + 60
        while "coordinator_back" not in events and time.monotonic() < give_up:
            if step == 5:
                os.kill(pid, signal.SIGKILL)
            update, news = leader.next_update(step, base, _load(step))
            base, expected = VersionedState(update.version, update.state), law.update(_load(step), expected, step)
            events += [event["event"] for event in news]
            step += 1
            time.sleep(0.05)  # the step that the control path hides behind
        assert events == ["coordinator_lost", "coordinator_back"]
        assert base.state.bias_N.equal(expected.bias_N) and base.version == step
        status = ray.get(actor.status.remote(), timeout=300)
        assert status["pid"] != pid and status["version"] == step and status["last_step"] == step - 1
    finally:
        ray.kill(actor)
