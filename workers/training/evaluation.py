"""Loss and load on held-out text, summed over all ranks.

Shapes: S sources of text, B sequences, T tokens of a batch, K top-k, E experts of a layer, N of all MoE layers.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.balance import routers_of
from dispatch.routing.router import Router
from dispatch.routing.selection import count_by_expert
from dispatch.values import to_device
from workers.data.sampler import Sampler
from workers.data.shards import Dataset
from workers.data.windows import NO_TARGET
from workers.distributed.context import Context
from workers.distributed.parallel import RankGroups
from workers.model.decoder import Decoder
from workers.model.loss import TokenLoss
from workers.training.own_part import OwnPart, own_part

if TYPE_CHECKING:
    from workers.training.pipeline import Pipeline


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss in nats per token and in bits per byte of text, overall and by source; equal on all ranks.

    load_SN: int64 on the CPU, tokens of each source that each expert got, chosen by the current bias.
    """

    val_loss: float
    val_bits_per_byte: float
    val_bits_per_byte_per_source: dict[str, float]
    num_tokens: int
    load_SN: Tensor
    eval_s: float

    @property
    def total_load(self) -> Tensor:
        """Held-out tokens by expert, over all sources: int64 (N,)."""
        load_N: Tensor = self.load_SN.sum(0)
        return load_N


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
    routers: Mapping[str, Router] | None = None,
    pipeline: "Pipeline | None" = None,
) -> Evaluation:
    """Measure the model on held-out sequences, the same ones at any world size.

    Args:
        batch_size: sequences of a forward.
        num_sequences: how many are read, over all ranks; None for all.
        routers: with a pipeline, those of all stages, whose load is wanted; by default those of `model`.
        pipeline: where `model` is this rank's part of one.

    Collective: every rank makes the same number of forwards, of padding where its share is shorter, and two
    reductions. Leaves the model in training mode, and the routers' own counters as they were.
    """
    began = time.perf_counter()
    groups.tracker.set_phase("evaluation")
    model.eval()
    num_sources = len(dataset.source_names)
    # Nats and tokens by source. float64, so that the order of the sum, which ranks change, hardly matters.
    totals = torch.zeros(2, num_sources, dtype=torch.float64)
    with _HeldOutLoad(routers_of(model) if routers is None else routers, num_sources) as load:
        for batch in sampler.val_batches(groups.share, groups.num_shares, batch_size, num_sequences):
            load.source_B, load.is_real_B = (
                to_device(each, groups.device) for each in (batch.source_B, batch.is_real_B)
            )
            shared = own_part(batch.sequences.to(groups.device), groups.context)
            loss = _loss(model, shared, groups.context, autocast, pipeline)
            if loss is None:  # of a pipeline, only the rank with the last stage has the loss
                continue
            nats_B = loss.of_token.sum(1, dtype=torch.float64).cpu()
            tokens_B = batch.is_real_B * (shared.targets.cpu() != NO_TARGET).sum(1)
            # where, not a product: a NaN of a padding row must not reach the sum.
            totals[0].index_add_(0, batch.source_B, torch.where(batch.is_real_B, nats_B, 0.0))
            totals[1].index_add_(0, batch.source_B, tokens_B.double())
    model.train()
    totals, load_SN = _sum_over_ranks(totals, groups), _sum_over_ranks(load.by_source(), groups)
    nats, tokens = totals[0].tolist(), [int(count) for count in totals[1].tolist()]
    bits, bits_by_source = dataset.bits_per_byte(nats, tokens)
    seconds = time.perf_counter() - began
    return Evaluation(sum(nats) / sum(tokens), bits, bits_by_source, sum(tokens), load_SN, seconds)


def _loss(
    model: Decoder,
    shared: OwnPart,
    context: Context | None,
    autocast: AbstractContextManager[None],
    pipeline: "Pipeline | None",
) -> TokenLoss | None:
    if pipeline is not None:
        return pipeline.evaluate(shared)
    with autocast:
        loss: TokenLoss = model(
            shared.input_ids, targets=shared.targets, document_starts=shared.document_starts, context=context
        )
    return loss


class _HeldOutLoad:
    """A context in which the choices of the routers are counted by source, by hooks.

    The routers' own counters hold the training load, and do not count in forwards without gradients.
    """

    def __init__(self, routers: Mapping[str, Router], num_sources: int) -> None:
        self._routers, self._num_sources = routers, num_sources
        self._loads_SE = {
            name: router.tokens_per_expert_E.new_zeros(num_sources, router.num_experts)
            for name, router in routers.items()
        }
        self._stack = ExitStack()
        # Of the current batch, set before each forward; rows that are not real are padding and are not counted.
        self.source_B = torch.zeros(0, dtype=torch.int64)
        self.is_real_B = torch.zeros(0, dtype=torch.bool)

    def __enter__(self) -> Self:
        for name, router in self._routers.items():
            handle = router.register_forward_hook(self._counter(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def by_source(self) -> Tensor:
        """The load by source: int64 (S, N) on the CPU, experts in module order."""
        empty_S0 = torch.zeros(self._num_sources, 0, dtype=torch.int64)
        return torch.cat([empty_S0, *(load_SE.cpu() for load_SE in self._loads_SE.values())], dim=1)

    def _counter(self, name: str) -> Any:
        def count(router: Router, _inputs: object, choice: tuple[Tensor, Tensor]) -> None:
            topk_ids_TK, load_SE = choice[0], self._loads_SE[name]
            num_tokens = topk_ids_TK.shape[0] // max(1, len(self.is_real_B))  # of each sequence
            mask_TK = self.is_real_B.repeat_interleave(num_tokens).unsqueeze(1).expand_as(topk_ids_TK)
            # One histogram for all sources: a cell is a pair of source and expert.
            cells_TK = topk_ids_TK + router.num_experts * self.source_B.repeat_interleave(num_tokens).unsqueeze(1)
            load_SE += count_by_expert(cells_TK, load_SE.numel(), mask_TK).view_as(load_SE)

        return count


def _sum_over_ranks(totals: Tensor, groups: RankGroups) -> Tensor:
    groups.tracker.run(dist.all_reduce, totals, group=groups.control_group)
    return totals
