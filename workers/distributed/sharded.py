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
    """This rank's rows, as a view without gradient, and the index of the first; all rows and 0 if it is not sharded.

    FSDP shards dimension 0 as torch.chunk does: the last ranks may have fewer rows, or none.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    num_rows, group = tensor.shape[0], _shard_group(tensor)
    rows_per_rank = -(-num_rows // group.size())
    return tensor.to_local(), min(group.rank() * rows_per_rank, num_rows)


@torch.no_grad()
def all_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The whole tensor from each rank's `rows` of it, sharded as `like` is; `rows` itself where `like` is not sharded.

    Collective over the ranks that `like` is sharded over.
    """
    if not isinstance(like, DTensor):
        return rows
    num_rows, group = like.shape[0], _shard_group(like)
    rows_per_rank = -(-num_rows // group.size())
    padded = rows.new_zeros(rows_per_rank, *rows.shape[1:])  # an all-gather takes equally much of each rank
    padded[: len(rows)] = rows
    gathered = rows.new_empty(group.size() * rows_per_rank, *rows.shape[1:])
    gather_into(gathered, padded, group)
    return gathered[:num_rows]  # only the last ranks lack rows, so all padding is at the end


def gather_into(gathered: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `gathered` with each rank's `own`, in rank order, on the current stream. Collective."""
    # torch 2.13 calls it all_gather_single, and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, own, group=group)


def _shard_group(tensor: DTensor) -> dist.ProcessGroup:
    """The ranks that a tensor's rows are divided over: the last dimension of its mesh, after that of the replicas."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)
