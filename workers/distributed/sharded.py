"""Tensors that are sharded over ranks, seen by one of them: its rows, and which rows these are."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only some of its rows."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of this rank, a view, and the index of the first; of a tensor that is not sharded all rows, and 0.

    FSDP shards dimension 0 as torch.chunk does: the last ranks may have fewer rows, or none.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    num_rows, group = tensor.shape[0], _shard_group(tensor)
    rows_of_rank = -(-num_rows // group.size())
    return tensor.to_local(), min(group.rank() * rows_of_rank, num_rows)


@torch.no_grad()
def all_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The rows of all ranks, of a tensor sharded as `like` is; `rows` itself where `like` is not sharded.

    Collective over the ranks that share it out.
    """
    if not isinstance(like, DTensor):
        return rows
    num_rows, group = like.shape[0], _shard_group(like)
    rows_of_rank = -(-num_rows // group.size())
    own = rows.new_zeros(rows_of_rank, *rows.shape[1:])
    own[: len(rows)] = rows
    whole = rows.new_empty(group.size() * rows_of_rank, *rows.shape[1:])
    gather_into(whole, own, group)
    return whole[:num_rows]  # what the last ranks lack is at the end


def gather_into(whole: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `whole` with `own` of each rank, one after the other. Collective."""
    # Called all_gather_single since torch 2.13, which warns of the name before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, own, group=group)


def _shard_group(tensor: DTensor) -> dist.ProcessGroup:
    """The ranks among which its rows are shared out: the last dimension of its mesh, after that of the replicas."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)
