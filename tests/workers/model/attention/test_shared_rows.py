"""Sequences that ranks share: loss, gradients and counts of a model are those of one process that has all."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.balance import read_counts, routers_of
from tests.ranks import run_ranks
from tests.workers.model.attention.slow_masks import starts_of
from tests.workers.model.attention.test_documents import KINDS, inputs, slow_varlen
from tests.workers.model.test_decoder import VARIANT, build, tokens
from workers.distributed.context import Context
from workers.model.attention import Documents, LatentConfig
from workers.model.attention.attend import attend, attend_by_varlen
from workers.model.decoder import Decoder
from workers.model.loss import after_next

LATENT = {"attention": "latent", "latent": LatentConfig(query_rank=6, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"query_key_norm": "head"},
    "variant": VARIANT,
    "latent": LATENT,
    "recomputed": {**VARIANT, "recompute": "full"},
    "attention recomputed": {**LATENT, "recompute": "attention"},
    "multi-token prediction": {"num_mtp_layers": 1},
}
# No number of ranks divides 13 places; the cut of two lies in a document, that of three at the end of one too.
PACKED = starts_of([5, 4, 1, 3], [13])


def learn(model: Decoder, ids: Tensor, starts: Tensor, context: Context | None) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss, all gradients and the counts; of this rank's places where there is a context."""
    targets = ids.roll(-1, 1)
    given = {"input_ids": ids, "targets": targets, "further_targets": after_next(targets)}
    if context is not None:
        given = {name: context.local_tokens(each) for name, each in given.items()}
    ids, has_mtp = given.pop("input_ids"), model.config.num_mtp_layers > 0
    further = {"next_ids": given["targets"]} if has_mtp else {}
    predicted = model(ids, document_starts=starts, context=context, **given, **further)
    loss = predicted[0].total + predicted[1].total if has_mtp else predicted.total
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.detach(), gradients, read_counts(routers_of(model))


def shared(rank: int, world_size: int, settings: dict[str, Any], starts: Tensor) -> None:
    wanted = learn(build(**settings).double(), tokens(*starts.shape), starts, None)
    context = Context(rank, world_size, dist.group.WORLD)
    loss, gradients, counts = learn(build(**settings).double(), tokens(*starts.shape), starts, context)
    for each in [loss, *gradients, counts]:
        dist.all_reduce(each)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-12, atol=0)
    assert torch.equal(counts, wanted[2])
    for found, other in zip(gradients, wanted[1], strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_what_one_process_learns(name: str, world_size: int) -> None:
    starts = torch.zeros_like(PACKED) if MODELS[name].get("num_mtp_layers") else PACKED
    run_ranks(world_size, shared, MODELS[name], starts)


def attends(rank: int, world_size: int, kind: str, starts: Tensor) -> None:
    """Blocks by one kernel give what they give in turns, each rank with its own queries."""
    context = Context(rank, world_size, dist.group.WORLD)
    documents, there = (Documents.from_starts(starts, each).with_window(KINDS[kind][0]) for each in (None, context))
    leaves = inputs(starts, kind)
    wanted = attend(*leaves, documents)
    mine = context.local_tokens(leaves[0])
    found = attend_by_varlen(mine, leaves[1], leaves[2], there, None, slow_varlen)
    torch.testing.assert_close(found, context.local_tokens(wanted), rtol=1e-10, atol=1e-12)
    assert there.sequence_arguments is there.sequence_arguments  # brought to the device once for all layers


@pytest.mark.parametrize("kind", ["plain", "window", "latent widths"])
def test_one_kernel_for_a_ranks_documents_gives_the_same(kind: str) -> None:
    run_ranks(2, attends, kind, PACKED)
