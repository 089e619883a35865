"""What a rank has of a batch, which other ranks may share."""

from typing import NamedTuple

import torch
from torch import Tensor

from workers.data.sampler import Batch
from workers.distributed.context import Context
from workers.model.loss import after_next


class OwnPart(NamedTuple):
    """This rank's places of each row of a batch: all of them, where no rank shares it.

    Attributes:
        input_ids, targets: int64 (B, places), as of the batch.
        document_starts: int64 (B, S) of whole rows; None only where they have no documents and no rank shares them.
        further_targets: int64 (B, places) of multi-token prediction; None: those that follow `targets`.
    """

    input_ids: Tensor
    targets: Tensor
    document_starts: Tensor | None
    further_targets: Tensor | None = None


def own_part(batch: Batch, context: Context | None) -> OwnPart:
    """Cut a batch; on the device where it is."""
    if context is None:
        return OwnPart(*batch)
    starts = torch.zeros_like(batch.input_ids) if batch.document_starts is None else batch.document_starts
    # Shifted before the cut: what follows the last token of a part is the first of the next.
    of_tokens = (batch.input_ids, batch.targets, after_next(batch.targets))
    ids, targets, further = (context.part(each).contiguous() for each in of_tokens)
    return OwnPart(ids, targets, starts, further)
