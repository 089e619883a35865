"""Demand, supply and rank order: pure, without Ray."""

from dataclasses import replace

import pytest

from cluster.config import ClusterConfig
from cluster.gang.placement import (
    ClusterTooSmall,
    check_fits,
    node_of_ranks,
    rank_order,
    rank_places,
    threads_of,
    worker_resources,
)
from workers.actor import WorkerLocation

JOINED = ClusterConfig(address="10.0.0.1:6379", num_workers=4, cpus_per_worker=2.0)


def place(ip: str, gpu: int | str | None = None, *, num_cores: int = 8) -> WorkerLocation:
    gpu_ids = () if gpu is None else (gpu,)
    return WorkerLocation(node_id=f"node of {ip}", ip=ip, gpu_ids=gpu_ids, pid=1, num_cores=num_cores)


def test_ranks_follow_addresses_as_numbers_then_gpus_whatever_the_bundle_order():  # 29
    places = [place("10.0.0.10", 0), place("10.0.0.9", 10), place("10.0.0.9", 2), place("10.0.0.10", 1)]
    # As text 10.0.0.10 would precede 10.0.0.9, and GPU 10 GPU 2.
    assert rank_order(places) == [2, 1, 0, 3]
    assert rank_order([place("10.0.0.9", "MIG-b"), place("10.0.0.9", "MIG-a")]) == [1, 0]
    shuffled = [places[i] for i in (3, 1, 0, 2)]
    assert [shuffled[b] for b in rank_order(shuffled)] == [places[b] for b in rank_order(places)]


def test_expert_parallel_groups_stay_on_a_node_where_they_fit():
    places = [place(ip) for ip in ("10.0.0.1", "10.0.0.2", "10.0.0.3") for _ in range({"10.0.0.2": 2}.get(ip, 3))]
    # Nodes with 3, 2, 3 places and groups of 2: by address alone two groups would cross nodes, [2, 3] and [4, 5].
    assert rank_order(places, 2) == [0, 1, 3, 4, 5, 6, 2, 7]
    assert rank_order(places, 4) == list(range(8))  # none fits


def test_a_rank_keeps_the_bundle_and_the_threads_of_its_worker():
    locations = {
        7: place("10.0.0.9", num_cores=4),
        2: place("10.0.0.10", num_cores=6),
        5: place("10.0.0.9", num_cores=4),
    }
    rows = rank_places(locations, 1, 0)
    assert [(row.rank, row.bundle, row.ip, row.num_threads) for row in rows] == [
        (0, 5, "10.0.0.9", 2), (1, 7, "10.0.0.9", 2), (2, 2, "10.0.0.10", 6),
    ]  # fmt: skip


def test_machines_are_numbered_as_ranks_reach_them():
    assert node_of_ranks(["10.0.0.9", "10.0.0.9", "10.0.0.10", "10.0.0.9"]) == (0, 0, 1, 0)


def test_workers_that_share_a_node_share_its_cores():
    places = [place("10.0.0.1", num_cores=7), place("10.0.0.1", num_cores=7), place("10.0.0.2", num_cores=2)]
    assert threads_of(places, 0) == [3, 3, 2]
    assert threads_of(places, 5) == [5, 5, 5]
    assert threads_of([place("10.0.0.1", num_cores=2)] * 3, 0) == [1, 1, 1]
    two_ray_nodes = [place("10.0.0.1"), replace(place("10.0.0.1"), node_id="another node of the machine")]
    assert threads_of(two_ray_nodes, 0) == [4, 4]


@pytest.mark.parametrize(
    ("device", "num_cluster_gpus", "gpus"), [("auto", 4, 1.0), ("auto", 3, None), ("cpu", 4, None), ("cuda", 0, 1.0)]
)
def test_a_worker_asks_for_a_gpu_if_told_to_or_if_all_can_have_one(device, num_cluster_gpus, gpus):
    assert worker_resources(replace(JOINED, device=device), num_cluster_gpus).get("GPU") == gpus


def test_a_ray_of_our_own_holds_any_number_of_workers():
    config = ClusterConfig(num_workers=64)
    check_fits(config, worker_resources(config, 0), {"127.0.0.1": {"CPU": 2.0}})


def test_what_fits_in_sum_but_not_on_any_node_is_refused_with_demand_and_supply():
    demand = worker_resources(JOINED, 0)
    check_fits(JOINED, demand, {"a": {"CPU": 4.0}, "b": {"CPU": 4.0}})
    # Eight CPUs are there, but three nodes have one each to spare.
    nodes = {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}, "c": {"CPU": 1.0}, "d": {"CPU": 1.0}}
    with pytest.raises(ClusterTooSmall) as caught:
        check_fits(JOINED, demand, nodes)
    assert str(caught.value) == (
        "4 workers need 2 CPU each, but the cluster has room for 2 (a: 3 CPU; b: 3 CPU; c: 1 CPU; d: 1 CPU). "
        "Add nodes, or set cluster.num_workers to 2 or less, or lower cluster.cpus_per_worker"
    )


def test_no_nodes_at_all_is_said_so():
    with pytest.raises(ClusterTooSmall, match=r"room for 0 \(no nodes\)"):
        check_fits(JOINED, worker_resources(JOINED, 0), {})
