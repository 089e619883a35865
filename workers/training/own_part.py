"""The part of a batch that a rank computes, where other ranks share its sequences (context parallelism)."""

from typing import NamedTuple

import torch
from torch import Tensor

from workers.data.sampler import Batch
from workers.distributed.context import Context
from workers.model.loss import after_next


class OwnPart(NamedTuple):
    """This rank's tokens of each row of a batch: a run of C of its S tokens, or all of them where no rank shares it.

    Attributes:
        input_ids, targets: int64 (B, C).
        document_starts: int64 (B, S), of whole rows; None where rows have no documents and no rank shares them.
        further_targets: int64 (B, C), targets of multi-token prediction; None where they follow from `targets`.
    """

    input_ids: Tensor
    targets: Tensor
    document_starts: Tensor | None
    further_targets: Tensor | None = None


def own_part(batch: Batch, context: Context | None) -> OwnPart:
    """Cut this rank's part out of a batch, on the device where the batch is."""
    if context is None:
        return OwnPart(*batch)
    starts = torch.zeros_like(batch.input_ids) if batch.document_starts is None else batch.document_starts
    # Shifted before the cut: the token after the last one of this part is the first one of another rank's part.
    by_token = (batch.input_ids, batch.targets, after_next(batch.targets))
    ids, targets, further = (context.local_tokens(each).contiguous() for each in by_token)
    return OwnPart(ids, targets, starts, further)
