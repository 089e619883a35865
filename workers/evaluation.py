"""Loss on held-out text, summed over all ranks."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from workers.model import Decoder, token_nll
from workers.parallel import RankGroups
from workers.sampler import Sampler
from workers.shards import Dataset


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss in nats per token and in bits per byte of text, overall and by source; equal on all ranks."""

    val_loss: float
    val_bits_per_byte: float
    val_bits_per_byte_per_source: dict[str, float]
    num_tokens: int
    eval_s: float


@torch.no_grad()
def evaluate(
    model: Decoder,
    dataset: Dataset,
    sampler: Sampler,
    groups: RankGroups,
    *,
    batch_size: int,
    num_sequences: int | None,
    autocast: AbstractContextManager[None],
) -> Evaluation:
    """Measure the model on the same sequences at any world size.

    Collective: every rank makes the same number of forwards, padded where its share is shorter, and one reduction.
    Leaves the model in training mode; evaluation never counts as load.
    """
    began = time.perf_counter()
    model.eval()
    num_sources = len(dataset.source_names)
    totals = torch.zeros(2, num_sources, dtype=torch.float64)  # nats and tokens, by source
    for batch in sampler.val_batches(groups.rank, groups.world_size, batch_size, num_sequences):
        with autocast:
            logits = model(batch.input_ids.to(groups.device))
        nats_B = token_nll(logits, batch.targets.to(groups.device)).sum(1, dtype=torch.float64).cpu()
        tokens_B = batch.is_real_B * float(batch.targets.shape[1])
        # where, not a product: a NaN of a padding row must not reach the sum.
        totals[0].index_add_(0, batch.source_B, torch.where(batch.is_real_B, nats_B, 0.0))
        totals[1].index_add_(0, batch.source_B, tokens_B.double())
    model.train()
    totals = _sum_over_ranks(totals, groups)
    nats, tokens = totals[0].tolist(), [int(count) for count in totals[1].tolist()]
    bits, bits_by_source = dataset.bits_per_byte(nats, tokens)
    return Evaluation(sum(nats) / sum(tokens), bits, bits_by_source, sum(tokens), time.perf_counter() - began)


def _sum_over_ranks(totals: Tensor, groups: RankGroups) -> Tensor:
    dist.all_reduce(totals, group=groups.control_group)
    return totals
