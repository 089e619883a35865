"""Tensors that are sharded over ranks, seen by one of them: its rows, and which rows these are."""

import torch
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
    num_rows, mesh = tensor.shape[0], tensor.device_mesh
    rows_of_rank = -(-num_rows // mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * rows_of_rank, num_rows)
