"""Placement of the workers: what each reserves, whether the cluster can hold them, and which rank each becomes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import groupby
from typing import TYPE_CHECKING

from cluster.config import ClusterConfig
from dispatch.errors import UserError
from workers.actor import WorkerLocation, gpu_order

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# A local Ray has only our workers, and Ray does not enforce CPU reservations. So they reserve next to nothing, and more
# workers than cores can be placed.
LOCAL_CPUS = 0.01
CHECK_RAY_EVERY_S = 1  # While workers wait for a place. `PlacementGroup.wait` takes whole seconds.


class ClusterTooSmall(UserError, RuntimeError):
    """The workers do not fit on the cluster."""


@dataclass(frozen=True, kw_only=True)
class RankPlace(WorkerLocation):
    """One row of the rank map: where a rank's worker is. bundle: its index in the placement group."""

    rank: int
    bundle: int
    num_threads: int

    @property
    def device(self) -> str:
        return "cuda " + ",".join(map(str, self.gpu_ids)) if self.gpu_ids else "cpu"


def worker_resources(config: ClusterConfig, num_cluster_gpus: float) -> dict[str, float]:
    """What one worker reserves, by Ray's resource names. A worker that reserves a GPU computes on cuda.

    With device `auto` a worker gets a GPU only if there is one for every worker: all ranks of a gang use the same kind
    of device, since one backend (NCCL or gloo) joins them.
    """
    cpus = LOCAL_CPUS if config.address is None else config.cpus_per_worker
    gpus = config.gpus_per_worker
    if config.device == "cpu":
        gpus = 0.0
    elif gpus is None:
        gpus = 1.0 if config.device == "cuda" or num_cluster_gpus >= config.num_workers else 0.0
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def demand_of(config: ClusterConfig) -> dict[str, float]:
    """What one worker reserves on the cluster that this process is connected to."""
    import ray

    return worker_resources(config, ray.cluster_resources().get("GPU", 0.0))


def check_fits(config: ClusterConfig, demand: Mapping[str, float], nodes: Mapping[str, Mapping[str, float]]) -> None:
    """Raise ClusterTooSmall unless all workers fit on the nodes (address to resources) when nothing else runs there."""
    room = sum(num_workers_on(demand, resources) for resources in nodes.values())
    if room >= config.num_workers:
        return
    supply = "; ".join(f"{node}: {_amounts(resources, demand)}" for node, resources in sorted(nodes.items()))
    advice = [f"set cluster.num_workers to {room} or less"] if room else []
    advice += ["lower cluster.cpus_per_worker"] if config.address is not None else []
    advice += ["set cluster.device to cpu"] if "GPU" in demand else []
    raise ClusterTooSmall(
        f"{config.num_workers} workers need {_amounts(demand, demand)} each, but the cluster has room for {room} "
        f"({supply or 'no nodes'}). Add nodes, or {', or '.join(advice)}"
    )


def num_workers_on(demand: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Count the workers that a node with these resources holds when nothing else runs there."""
    # 1e-9 absorbs rounding: 0.6 GPU hold three workers of 0.2, though 0.6 / 0.2 is 2.9999999999999996.
    return min(math.floor(resources.get(name, 0.0) / amount + 1e-9) for name, amount in demand.items())


def _amounts(resources: Mapping[str, float], names: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in names)


def reserve(config: ClusterConfig, check_ray: Callable[[], None]) -> PlacementGroup:
    """Reserve one bundle for each worker, on as few nodes as possible. Waits until all are reserved.

    Raises:
        RayDied: raised by `check_ray`, which is called every CHECK_RAY_EVERY_S.
        ClusterTooSmall: at once if the cluster could not hold the workers even when idle; after `start_timeout_s` if
            others use it.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = {f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": node["Resources"] for node in alive}
    demand = demand_of(config)
    check_fits(config, demand, nodes)
    # PACK: the tokens of an expert-parallel group should not cross the network where its ranks fit on one node.
    group: PlacementGroup = placement_group([demand] * config.num_workers, strategy="PACK")
    deadline = time.monotonic() + config.start_timeout_s
    while not (placed := group.wait(CHECK_RAY_EVERY_S)) and time.monotonic() < deadline:
        check_ray()
    if not placed:
        remove_placement_group(group)
        free = _amounts(ray.available_resources(), demand)
        raise ClusterTooSmall(
            f"{config.num_workers} workers need {_amounts(demand, demand)} each; after {config.start_timeout_s:g} s "
            f"the whole cluster has only {free} free. "
            "Stop what else runs there, or raise cluster.start_timeout_s to wait longer"
        )
    return group


def rank_places(
    locations: Mapping[int, WorkerLocation], ep_size: int, threads_per_worker: int
) -> tuple[RankPlace, ...]:
    """The place of each rank, by rank. locations: where each worker runs, by index of its bundle."""
    bundles = sorted(locations)
    places = [locations[bundle] for bundle in bundles]
    threads = threads_of(places, threads_per_worker)
    return tuple(
        RankPlace(**vars(places[index]), rank=rank, bundle=bundles[index], num_threads=threads[index])
        for rank, index in enumerate(rank_order(places, ep_size))
    )


def rank_order(places: Sequence[WorkerLocation], ep_size: int = 1) -> list[int]:
    """Indices into `places` in rank order: by node address as a number, then GPU, then index.

    First come the workers of each node that fill whole expert-parallel groups, then the remaining workers of all nodes.
    Ranks 0 to ep_size - 1 and so on thus share a node wherever a node has that many workers.

    Placement groups promise no order, and Ray's node ids change with every start. Which experts a process holds follows
    from its rank, so the same machines must give the same ranks again: hence addresses.
    """

    def key(index: int) -> tuple[int, int, list[tuple[int, str]], int]:
        address = ip_address(places[index].ip)
        return address.version, int(address), [gpu_order(gpu_id) for gpu_id in places[index].gpu_ids], index

    in_whole_groups, rest = [], []
    for _, on_node in groupby(sorted(range(len(places)), key=key), lambda index: places[index].ip):
        indices = list(on_node)
        num_in_groups = len(indices) // ep_size * ep_size
        in_whole_groups += indices[:num_in_groups]
        rest += indices[num_in_groups:]
    return in_whole_groups + rest


def node_of_ranks(ips: Sequence[str]) -> tuple[int, ...]:
    """The index of each rank's machine by rank, in the order in which machines first appear."""
    index = {ip: number for number, ip in enumerate(dict.fromkeys(ips))}
    return tuple(index[ip] for ip in ips)


def threads_of(places: Sequence[WorkerLocation], threads_per_worker: int) -> list[int]:
    """Compute threads of each worker: as set, or its machine's cores divided by the workers there, at least 1."""
    num_on_machine = Counter(place.ip for place in places)  # by address as in `node_of_ranks`: it may run two Ray nodes
    return [threads_per_worker or max(1, place.num_cores // num_on_machine[place.ip]) for place in places]
