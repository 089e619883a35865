"""Groups of ranks that each hold all states once: sharded inside a group, replicated across the groups (HSDP)."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dispatch.errors import InvalidValue


@dataclass(frozen=True)
class ReplicaGroups:
    """One rank's groups where states are replicated `num_replicas` times.

    Neighbouring ranks, which share a node where they fit, form a group that holds everything once. World 8, EP 2, two
    replicas, expert shards A and B:

        group 0: ranks 0 1 2 3, with experts  A B A B
        group 1: ranks 4 5 6 7, with experts  A B A B

    Dense parameters are sharded over the four ranks of a group; the experts A over ranks 0 and 2, and again over 4 and
    6.

    dense: the mesh (replicate, shard) over all ranks, with a pipeline over those of this rank's stage. experts: the
    mesh (replicate, shard) over the ranks with the same experts as this one.
    """

    num_replicas: int
    dense: DeviceMesh
    experts: DeviceMesh

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """All process groups of the meshes."""
        return [*self.dense.get_all_groups(), *self.experts.get_all_groups()]


def make_replica_groups(
    num: int, world_size: int, ep_size: int, device_type: str, num_stages: int = 1
) -> ReplicaGroups | None:
    """Form the groups; None where there is one replica. The sizes must have passed `check_replicas`.

    num_stages: stages of a pipeline, equal runs of neighbouring ranks that each have `num` replicas.

    Collective over the default group.
    """
    if num == 1:
        return None
    stages = {"stage": num_stages} if num_stages > 1 else {}
    group_size = world_size // num_stages // num
    dense = _mesh(device_type, stages | {"replicate": num, "shard": group_size})["replicate", "shard"]
    if group_size % ep_size:  # each expert has one holder in all replicas: `experts` is not used
        return ReplicaGroups(num, dense, dense)
    sizes = {"expert_replicate": num, "expert_shard": group_size // ep_size, "expert_ep": ep_size}
    return ReplicaGroups(num, dense, _mesh(device_type, stages | sizes)["expert_replicate", "expert_shard"])


def _mesh(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def replica_counts(world_size: int, ep_size: int) -> list[int]:
    """The possible values of `parallel.replicate`.

    All replicas must have the same number of ranks, at least two, and the same number of holders of each expert. Where
    an expert has one holder (ep_size is world_size), only the number of ranks counts.
    """
    num_holders = world_size // ep_size  # ranks with the same experts
    return [
        num
        for num in range(1, max(1, world_size // 2) + 1)
        if world_size % num == 0 and (num_holders == 1 or num_holders % num == 0)
    ]


def check_replicas(num: int, world_size: int, ep_size: int) -> None:
    """Raise InvalidValue unless `num` is one of `replica_counts`."""
    if num not in (possible := replica_counts(world_size, ep_size)):
        raise InvalidValue(
            f"parallel.replicate ({num}) must divide the number of workers ({world_size}) into groups of at least two, "
            f"and the ranks that hold the same experts ({world_size // ep_size}, at parallel.ep_size {ep_size}); use "
            f"one of {possible}"
        )
