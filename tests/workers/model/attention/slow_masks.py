"""The mask of a whole row that attention over documents and windows must equal, in a model too."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from workers.model.attention import Documents
from workers.model.decoder import Decoder


def mask_of_documents(document_starts: Tensor) -> Tensor:
    """Bool (B, 1, S, S): a token sees its own document up to itself."""
    places = torch.arange(document_starts.shape[1], device=document_starts.device)
    not_before, not_after = places >= document_starts.unsqueeze(2), places <= places.unsqueeze(1)
    return (not_before & not_after).unsqueeze(1)


def under_window(mask: Tensor, window: int) -> Tensor:
    """The same, at most `window` tokens of it; all where that is 0."""
    places = torch.arange(mask.shape[-1])
    near = places.unsqueeze(1) - places < window if window else torch.ones_like(mask)
    return mask & near


def starts_of(*rows: list[int]) -> Tensor:
    """int64 (B, S) from the lengths of each row's documents."""
    return torch.stack([torch.cat([torch.full((n,), sum(row[:i])) for i, n in enumerate(row)]) for row in rows])


@contextmanager
def whole_masks() -> Iterator[None]:
    """In it a model takes the mask for the documents of a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Documents, "from_starts", lambda starts, _context: mask_of_documents(starts))
        yield


def learn(model: Decoder, ids: Tensor, starts: Tensor | None) -> list[Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(ids, document_starts=starts, targets=ids.roll(-1, 1)).total
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def expect_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To the rounding of float64."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
