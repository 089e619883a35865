"""How many workers the cluster can hold, which nodes are being drained, and a standing request for more capacity."""

from __future__ import annotations

from typing import Any

import ray
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined] # made by protobuf
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from cluster.config import ClusterConfig
from cluster.gang.placement import demand_of, num_workers_on


def num_workers_that_fit(config: ClusterConfig) -> int:
    """Count the workers that the living nodes could hold if nothing else ran there, without nodes being drained."""
    draining = draining_nodes()
    demand = demand_of(config)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return sum(num_workers_on(demand, node["Resources"]) for node in nodes)


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that Ray was told to empty: a spot instance that is being taken back, a node to be upgraded."""
    state: Any = ray._private.state.state  # noqa: SLF001 Ray has no public way to ask; Ray Train asks like this.
    return frozenset(state.get_draining_nodes())


def preempted_nodes() -> frozenset[str]:
    """Ids of the nodes that a cloud is taking back or has taken back."""
    reason = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    gone = {node["NodeID"] for node in ray.nodes() if not node["Alive"] and node["DeathReason"] == reason}
    return draining_nodes() | gone


class CapacityRequest:
    """A standing request for bundles. An autoscaler sees it and may add nodes; granted bundles are held until `end`."""

    def __init__(self, config: ClusterConfig, num_workers: int) -> None:
        bundles = [demand_of(config)] * num_workers
        self._group: PlacementGroup | None = placement_group(bundles, strategy="PACK")

    def granted(self) -> bool:
        """Whether all bundles are reserved. Does not wait."""
        return self._group is not None and bool(placement_group_table(self._group)["state"] == "CREATED")

    def end(self) -> None:
        """Give the bundles back. Repeating it is harmless."""
        group, self._group = self._group, None
        if group is not None and ray.is_initialized():
            remove_placement_group(group)
