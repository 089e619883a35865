"""The gang on a real local Ray with real gloo; the worker is a dummy."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import ray

from cluster.config import ClusterConfig
from cluster.failures.errors import GangFailed, WorkerUnreachable
from cluster.failures.kill import kill_process
from cluster.gang.gang import Gang
from cluster.gang.placement import ClusterTooSmall
from cluster.ray.session import RaySession
from tests.cluster.dummy_worker import BrokenWorker, DummyWorker, StuckWorker
from workers.actor import WorkerLocation

pytestmark = pytest.mark.usefixtures("ray_session")

CONFIG = ClusterConfig(
    num_workers=2, device="cpu", threads_per_worker=1, start_timeout_s=60.0, collective_timeout_s=30.0
)


def all_gone(gang: Gang) -> bool:
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids(gang) if psutil.pid_exists(p)], timeout=60)
    return not alive


def pids(gang: Gang) -> list[int]:
    return [row.pid for row in gang.rank_map]


@pytest.fixture(scope="module")
def gang(ray_session: RaySession) -> Iterator[Gang]:
    """One gang for the tests that leave it whole: each start imports torch anew."""
    config = replace(CONFIG, threads_per_worker=3)
    with Gang.launch(config, DummyWorker, env={"TRIMTAB_TEST_MARK": "set", "NCCL_DEBUG": "WARN"}) as gang:
        yield gang


def test_ranks_sum_over_gloo_and_results_come_by_rank(gang):
    facts = gang.run("facts")
    assert [f["rank"] for f in facts] == [0, 1]
    assert [f["pid"] for f in facts] == pids(gang)
    assert gang.run("train", 5, {}) == [10.0, 10.0]


def test_environment_is_set_before_the_worker_is_imported_and_threads_when_it_joins(gang):
    for facts in gang.run("facts"):
        assert facts["mark_at_import"] == "set"
        assert facts["num_threads"] == 3
        assert facts["one_thread"]  # join and every run: a process group belongs to one thread at a time
        assert facts["interface"] == "lo"
        assert facts["cuda_devices"] == ""
    assert [row.num_threads for row in gang.rank_map] == [3, 3]


def test_ranks_have_the_priority_of_the_driver(gang):
    assert {psutil.Process(pid).nice() for pid in pids(gang)} == {psutil.Process().nice()}


def test_the_rank_map_names_the_machine_and_the_transport_and_every_rank_knows_who_is_a_neighbour(gang):
    assert [facts["nodes"] for facts in gang.run("facts")] == [(0, 0), (0, 0)]  # one machine
    for row in gang.rank_map:
        assert (row.ip, row.node_id, row.gpu_ids) == ("127.0.0.1", ray.get_runtime_context().get_node_id(), ())
        assert row.interface == "lo"
        assert row.transport["NCCL_SOCKET_IFNAME"] == row.transport["GLOO_SOCKET_IFNAME"] == "lo"
        assert row.transport["NCCL_DEBUG"] == "WARN"  # as it was given
        assert not [name for name in row.transport if not name.startswith(("NCCL_", "GLOO_", "TORCH_"))]


def test_every_socket_of_ray_and_of_the_gang_listens_on_loopback(gang):
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_control_is_answered_while_a_call_runs_and_on_poll_may_use_it(gang):
    answers = []

    def release_all() -> None:
        if not answers:
            answers.extend(gang.control(rank, "release") for rank in range(2))

    assert gang.run("train", 2, {(0, 1): "wait", (1, 1): "wait"}, on_poll=release_all, poll_s=0.05) == [4.0, 4.0]
    assert answers == ["released rank 0", "released rank 1"]
    with pytest.raises(GangFailed, match="KeyError"):
        gang.control(1, "refuse")
    assert gang.run("train", 1, {}) == [2.0, 2.0]  # a refused control call does no harm


def test_an_exception_of_on_poll_ends_the_gang(gang):  # The last to use the shared one.
    def interrupt() -> None:
        raise LookupError("stop at once")

    with pytest.raises(LookupError):
        gang.run("train", 1, {(0, 0): "wait"}, on_poll=interrupt)
    assert all_gone(gang)


def test_a_killed_worker_is_named_first_within_seconds_and_the_rest_is_ended():
    victim = 0  # It holds the store too.
    gang = Gang.launch(CONFIG, DummyWorker)
    begun = time.monotonic()
    with pytest.raises(GangFailed) as caught:
        gang.run("train", 1000, {(victim, 3): "die"})
    assert time.monotonic() - begun < 10  # the collective's limit is 30 s
    first = caught.value.first
    assert (first.rank, first.kind, first.pid) == (victim, "died", pids(gang)[victim])
    assert f"rank {victim} (127.0.0.1, pid {first.pid}) failed first, in train" in str(caught.value)
    assert all_gone(gang)


def test_a_worker_that_raises_is_named_first_while_its_peers_still_wait_for_it():
    gang = Gang.launch(CONFIG, DummyWorker)
    begun = time.monotonic()
    with pytest.raises(GangFailed, match=r"rank 1 .* failed first, in train: ValueError: a bad batch") as caught:
        gang.run("train", 1000, {(1, 3): "complain"})
    assert time.monotonic() - begun < 10
    assert isinstance(caught.value.first.error, ValueError)
    assert "dummy_worker.py" in caught.value.first.trace
    assert [f.kind for f in caught.value.failures] == ["error", "running"]
    assert "all_reduce" in caught.value.failures[1].trace  # where rank 0 hangs
    assert all_gone(gang)


def test_a_gang_forms_again_with_those_whose_call_ends_and_shrinks_to_those_who_are_left():
    with Gang.launch(CONFIG, DummyWorker) as gang:
        before = pids(gang)
        with pytest.raises(GangFailed) as caught:
            gang.run("train", 1000, {(1, 3): "complain"}, keep=True)
        assert caught.value.failures[1].kind == "running"  # until rank 1, which failed, has left the group
        gang.form_again(caught.value, limit_s=60.0)
        assert pids(gang) == before
        assert gang.run("train", 3, {}) == [6.0, 6.0]
        with pytest.raises(GangFailed) as caught:
            gang.run("train", 1000, {(0, 3): "die"}, keep=True)
        gang.shrink(caught.value, 1)
        assert pids(gang) == before[1:]
        assert gang.run("train", 3, {}) == [3.0]
        assert (gang.world_size, gang.num_places, gang.num_living_places()) == (1, 2, 2)


def test_a_frozen_worker_is_named_once_its_peers_have_waited_for_the_collective_and_replaced():
    with Gang.launch(replace(CONFIG, collective_timeout_s=2.0), DummyWorker) as gang:
        begun = time.monotonic()
        with pytest.raises(GangFailed, match=r"rank 1 .* does not answer") as caught:
            gang.run("train", 1000, {(1, 3): "freeze"}, keep=True)
        assert time.monotonic() - begun < 20
        failures = [(failure.rank, failure.kind, failure.collateral) for failure in caught.value.failures]
        assert failures == [(1, "silent", False), (0, "error", True)]
        thawed, frozen = gang.rank_map
        kill_process(WorkerLocation(node_id=frozen.node_id, ip=frozen.ip, gpu_ids=(), pid=frozen.pid, num_cores=1))
        assert psutil.wait_procs([psutil.Process(frozen.pid)], timeout=60)[1] == []
        gang.form_again(caught.value, limit_s=60.0)
        assert thawed.pid in pids(gang) and frozen.pid not in pids(gang)
        assert gang.run("train", 3, {}) == [6.0, 6.0]
    assert all_gone(gang)


def test_a_number_that_is_another_processes_by_now_is_left_alone():
    node = ray.get_runtime_context().get_node_id()
    with subprocess.Popen(["sleep", "60"]) as stranger, subprocess.Popen(["true"]) as over:
        over.wait()
        for pid in (stranger.pid, over.pid):
            kill_process(WorkerLocation(node_id=node, ip="127.0.0.1", gpu_ids=(), pid=pid, num_cores=1))
        time.sleep(3)
        assert stranger.poll() is None
        stranger.kill()


def test_control_of_a_dead_worker_says_so_and_does_not_hide_the_cause_from_run():
    gang = Gang.launch(CONFIG, DummyWorker)

    def ask_the_dead() -> None:
        psutil.Process(pids(gang)[1]).kill()
        psutil.wait_procs([psutil.Process(pids(gang)[1])] if psutil.pid_exists(pids(gang)[1]) else [], 5)
        gang.control(1, "release")

    with pytest.raises(GangFailed, match=r"rank 1 .* its process died"):
        gang.run("train", 1, {(0, 0): "wait", (1, 0): "wait"}, on_poll=ask_the_dead)
    with pytest.raises(WorkerUnreachable, match="rank 1"):
        gang.control(1, "release", timeout_s=2.0)
    assert all_gone(gang)


@pytest.mark.parametrize(
    ("make_worker", "limit_s", "message"),
    [
        (BrokenWorker, 60.0, "start: RuntimeError: cannot be built"),
        (StuckWorker, 4.0, "start: (was still running|has not started) after 4 s"),
    ],
)
def test_a_launch_that_fails_says_why_and_leaves_no_actor(make_worker, limit_s, message):
    with pytest.raises(GangFailed, match=message):
        Gang.launch(replace(CONFIG, start_timeout_s=limit_s), make_worker)
    _, alive = psutil.wait_procs(actors_left(), timeout=60)
    assert not alive


def actors_left() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "WorkerActor" in title(p)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # Also of one that is gone but not yet reaped.
        return ""


def test_too_few_gpus_are_named_at_once():
    config = replace(CONFIG, device="cuda")
    begun = time.monotonic()
    with pytest.raises(ClusterTooSmall, match=r"2 workers need 0\.01 CPU, 1 GPU each, .* room for 0 \(127\.0\.0\.1"):
        Gang.launch(config, DummyWorker)
    assert time.monotonic() - begun < 5


def test_cpus_that_others_use_are_waited_for_and_then_named():
    # An address makes workers reserve what the configuration says; this process is already connected.
    config = replace(CONFIG, address="auto", num_workers=2, cpus_per_worker=1.0, start_timeout_s=1.0)
    busy = ray.util.placement_group([{"CPU": 1}])
    assert busy.wait(10)
    try:
        with pytest.raises(ClusterTooSmall, match=r"need 1 CPU each; after 1 s the whole cluster has only 1 CPU free"):
            Gang.launch(config, DummyWorker)
    finally:
        ray.util.remove_placement_group(busy)
