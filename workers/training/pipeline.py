"""The stages of a pipeline that one rank holds, and how the micro-batches of a step pass through those of all ranks.

The order of work and the messages are those of torch.distributed.pipelining.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from dispatch.diagnosis.activity_tracker import PendingCollective
from dispatch.routing.router import Router
from workers.distributed.parallel import ParallelConfig, RankGroups
from workers.distributed.pipeline import PipelineConfig, PipelineGroups
from workers.distributed.sharded import local_rows
from workers.model.decoder import Decoder
from workers.model.loss import TokenLoss
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig
from workers.training.own_part import OwnPart
from workers.training.sharding import set_sync_of_stage


class Pipeline:
    """Runs micro-batches through the stages of all ranks; every rank of the gang calls its methods together.

    model: this rank's layers. autocast: a new context that computes in the run's dtype.
    """

    def __init__(
        self,
        model: Decoder,
        parallel: ParallelConfig,
        groups: RankGroups,
        run: RunConfig,
        autocast: Callable[[], AbstractContextManager[None]],
        mtp_weight: float,
    ) -> None:
        config, place = parallel.pipeline, groups.pipeline
        if place is None:
            raise ValueError("the groups were formed without a pipeline")
        self._model, self._groups, self._autocast, self._place = model, groups, autocast, place
        self._shard, self._mtp_weight, self._num_stages = parallel.shard, mtp_weight, config.num_stages
        self._num_micro = run.num_micro_batches(groups.dp_size)
        example = _example_activation(model, run.sequences_at_once(groups.dp_size))
        indices, parts = config.stages_of(place.rank), config.layers_of(place.rank, model.config.num_layers)
        self._stages = [
            TrackedStage(self._stage_module(layers), index, config.num_stages, example, groups, place)
            for index, layers in zip(indices, parts, strict=True)
        ]
        self._schedule = _schedule(config, self._stages, self._num_micro, self._loss)
        self._begin(1, lambda _: None)

    def _stage_module(self, layers: range) -> "_StageModule":
        return _StageModule(self._model, layers, self._autocast, self._after_forward, self._before_backward)

    def _begin(self, num_targets: int, on_last_forward: Callable[[Tensor], None]) -> None:
        self._num_targets, self._on_last_forward = num_targets, on_last_forward
        self._nll_sum = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        self._forwards: list[range] = []  # layers of the forwards so far, in their order
        self._backwards: list[range] = []  # the same of the backwards

    def step(self, batches: Sequence[OwnPart], num_targets: int, on_last_forward: Callable[[Tensor], None]) -> None:
        """Forward and backward of all micro-batches; gradients are added up.

        Args:
            batches: this rank's micro-batches, on its device. Ranks that pass activations on to each other have the
                same ones.
            num_targets: of the global batch, which the loss is divided by.
            on_last_forward: called once, when this rank has made its last forward, with the summed loss of its
                sequences: float64, 0 on ranks without the last stage.

        Collective over the pipeline.
        """
        self._begin(num_targets, on_last_forward)
        inputs = (torch.cat([batch.input_ids for batch in batches]),) if self._stages[0].is_first else ()
        targets = torch.cat([batch.targets for batch in batches]) if self._stages[-1].is_last else None
        starts = [batch.document_starts for batch in batches if batch.document_starts is not None]
        # torch cuts inputs, targets and keyword arguments into micro-batches again.
        kwargs: dict[str, Any] = {"document_starts": torch.cat(starts)} if starts else {}
        self._schedule.step(*inputs, target=targets, return_outputs=False, **kwargs)

    def sum_shared_gradients(self) -> None:
        """Add up the gradients of the embedding where the last stage holds it too, so that both make the same update.

        Call it after `reduce_gradients`. Collective: the ranks with the first and the last stage exchange messages.
        """
        first, last = self._stages[0].is_first, self._stages[-1].is_last
        if not (first or last) or not self._model.config.shares_embedding:
            return
        gradient = self._model.token_embedding.weight.grad
        if gradient is None:  # it is frozen
            return
        stage, other = (self._stages[0], self._num_stages - 1) if first else (self._stages[-1], 0)
        own = local_rows(gradient)[0]
        arriving, partner = torch.empty_like(own), stage.rank_of(other)
        stage.note_sent("embedding gradients", other)
        message = stage.expect("embedding gradients", other)
        ops = [
            dist.P2POp(dist.isend, own, partner, group=self._place.group),
            dist.P2POp(dist.irecv, arriving, partner, group=self._place.group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        message.end()
        own += arriving

    def sum_over_stages(self, value: int) -> int:
        """The sum of a value over the ranks of this pipeline. Collective over them."""
        total = torch.tensor(value, dtype=torch.int64, device=self._groups.device)
        self._groups.tracker.run(dist.all_reduce, total, group=self._place.group)
        return int(total)

    def busiest_rows(self, rows: Sequence[int]) -> Tensor:
        """Arrange this rank's `Reading.busiest_rows` of a step by micro-batch and MoE layer of the whole model.

        Returns int64 (number of micro-batches x number of MoE layers,), with 0 for the layers of other ranks. The order
        in which this rank made its forwards says which micro-batch and which layer each number is of.
        """
        config, remaining = self._model.config, iter(rows)
        placed = torch.zeros(self._num_micro, config.num_moe_layers, dtype=torch.int64)
        num_passes = dict.fromkeys(self._forwards, 0)
        for layers in self._forwards:
            micro = num_passes[layers]  # each stage makes its forwards in the order of the micro-batches
            for layer in layers:
                if layer >= config.num_dense_layers:
                    placed[micro, layer - config.num_dense_layers] = next(remaining)
            if config.num_mtp_layers and layers.stop == config.num_layers:
                placed[micro, -1] = next(remaining)
            num_passes[layers] += 1
        return placed.flatten()

    def evaluate(self, batch: OwnPart) -> TokenLoss | None:
        """The loss of a batch without gradients, on ranks with the last stage; None on the others.

        Collective over the pipeline.
        """
        sent, loss = [], None
        for stage in self._stages:
            x = batch.input_ids if stage.is_first else self._receive(stage, batch.input_ids)
            with self._autocast():
                x = self._model.run_layers(stage.layers, x, document_starts=batch.document_starts)
                if stage.is_last:
                    loss = self._model.loss(x, batch.targets)
                    break
            stage.note_sent("activations", stage.stage_index + 1)
            # `x` is kept with its work handle: its memory must not be reused before it has left.
            sent.append((dist.isend(x, stage.rank_of(stage.stage_index + 1), group=self._place.group), x))
        for work, _ in sent:
            if work is not None:
                work.wait()
        return loss

    def _receive(self, stage: "TrackedStage", input_ids: Tensor) -> Tensor:
        x = _example_activation(self._model, len(input_ids), input_ids.device)
        message = stage.expect("activations", stage.stage_index - 1)
        dist.recv(x, stage.rank_of(stage.stage_index - 1), group=self._place.group)
        message.end()
        return x

    def _loss(self, normed: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            loss = self._model.loss(normed, targets)
            total = loss.total
            if self._model.config.num_mtp_layers:
                total = total + self._mtp_weight * self._model.loss_after_next(normed, targets).total
        self._nll_sum += loss.total.detach()
        self._after_forward(self._stages[-1].layers)
        # As in Trainer: gradients are sums of losses divided by the targets of the global batch.
        return total / self._num_targets

    def _after_forward(self, layers: range) -> None:
        self._forwards.append(layers)
        if len(self._forwards) == self._num_micro * len(self._stages):
            self._on_last_forward(self._nll_sum)

    def _before_backward(self, layers: range) -> None:
        done = self._backwards
        done.append(layers)
        last, last_of_rank = done.count(layers) == self._num_micro, len(done) == self._num_micro * len(self._stages)
        set_sync_of_stage(self._model, layers, self._shard, is_last=last, is_last_of_rank=last_of_rank)


class _StageModule(nn.Module):
    """The module of a stage: some layers of the model, called by torch's stage with one micro-batch."""

    def __init__(
        self,
        model: Decoder,
        layers: range,
        autocast: Callable[[], AbstractContextManager[None]],
        after_forward: Callable[[range], None],
        before_backward: Callable[[range], None],
    ) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self._autocast, self._after_forward, self._before_backward = autocast, after_forward, before_backward

    def forward(self, x: Tensor, document_starts: Tensor | None = None) -> Tensor:
        with self._autocast():
            y = self.model.run_layers(self.layers, x, document_starts=document_starts)
        if self.layers.stop < self.model.config.num_layers:  # the last stage has ended its forward after the loss
            self._after_forward(self.layers)
        return y

    def before_backward(self) -> None:
        """Called before the backward of a micro-batch."""
        self._before_backward(self.layers)


class TrackedStage(PipelineStage):
    """A stage that notes on the rank's activity tracker what it does, and which messages it waits for.

    Sender and receiver note a message under the same name. The driver compares the ranks after a hang, and so sees
    which message is missing.
    """

    def __init__(
        self,
        module: _StageModule,
        index: int,
        num_stages: int,
        example: Tensor,
        groups: RankGroups,
        place: PipelineGroups,
    ) -> None:
        ids = torch.empty(example.shape[:2], dtype=torch.int64, device="meta")
        # Given example inputs and outputs, torch need not run the model once to learn their shapes.
        inputs = ids if index == 0 else example
        super().__init__(
            module, index, num_stages, groups.device, input_args=(inputs,), output_args=(example,), group=place.group
        )
        self.layers, self._before_backward = module.layers, module.before_backward
        self._tracker, self._place = groups.tracker, place
        self._expected: dict[tuple[str, int], PendingCollective] = {}

    def rank_of(self, stage: int) -> int:
        """The global rank of another stage in this pipeline."""
        return dist.get_global_rank(self._place.group, self.stage_index_to_group_rank[stage])

    def expect(self, what: str, source: int) -> PendingCollective:
        """Note that this rank waits for a message of another stage from now on."""
        self._tracker.set_phase(f"pipeline, stage {self.stage_index} waits for {what} of stage {source}")
        return self._tracker.note_message("irecv", *self._message(what, source, self.stage_index))

    def note_sent(self, what: str, destination: int) -> None:
        """Note that this rank has sent a message to another stage."""
        self._tracker.note_message("isend", *self._message(what, self.stage_index, destination)).end()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What torch receives before a forward."""
        ops: list[dist.P2POp] = super().get_fwd_recv_ops(fwd_chunk_id)
        if ops:
            self._expected["forward", fwd_chunk_id] = self.expect("activations", self.stage_index - 1)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What torch receives before a backward."""
        ops: list[dist.P2POp] = super().get_bwd_recv_ops(bwd_chunk_id)
        if ops:
            self._expected["backward", bwd_chunk_id] = self.expect("gradients", self.stage_index + 1)
        return ops

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What torch sends after a forward."""
        ops: list[dist.P2POp] = super().get_fwd_send_ops(fwd_chunk_id)
        if ops:
            self.note_sent("activations", self.stage_index + 1)
        return ops

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What torch sends after a backward."""
        ops: list[dist.P2POp] = super().get_bwd_send_ops(bwd_chunk_id)
        if ops:
            self.note_sent("gradients", self.stage_index - 1)
        return ops

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of a micro-batch."""
        self._arrived("forward", fwd_chunk_id)
        with _original_error():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Backward of a micro-batch."""
        self._arrived("backward", bwd_chunk_id)
        self._before_backward()
        with _original_error():
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _arrived(self, what: str, chunk: int) -> None:
        if (message := self._expected.pop((what, chunk), None)) is not None:
            message.end()
        self._tracker.set_phase(f"{what}, stage {self.stage_index}")

    def _message(self, what: str, source: int, destination: int) -> tuple[str, tuple[int, int]]:
        name = f"{self._place.group.group_name}, {what} of stage {source}"
        return name, (self.rank_of(source), self.rank_of(destination))


@contextmanager
def _original_error() -> Iterator[None]:
    """Raise the error of a stage's module as it was: torch wraps it in a RuntimeError, which hides its type."""
    try:
        yield
    except RuntimeError as error:
        # "failed to run" or "Failed to run", by the version of torch.
        if type(error) is RuntimeError and error.__cause__ is not None and "ailed to run" in str(error):
            raise error.__cause__ from None
        raise


def routers_of_all(
    routers: Mapping[str, Router], config: ModelConfig, device: torch.device, *, frozen: bool
) -> dict[str, Router]:
    """The routers of all stages in the order of the layers, with stand-ins for those of other ranks.

    All ranks then have the same vectors of load and bias. A stand-in holds the bias of its layer and counts nothing, so
    that the sum of the counts over all ranks has each layer once.

    routers: this rank's, by name. frozen: routers do not train, and their bias does not move.
    """
    names = [f"layers.{index}.moe.router" for index in range(config.num_dense_layers, config.num_layers)]
    names += ["mtp.block.moe.router"] * config.num_mtp_layers
    return {name: routers.get(name) or _stand_in(config, device, frozen) for name in names}


def _stand_in(config: ModelConfig, device: torch.device, frozen: bool) -> Router:
    with torch.device("meta"):  # its weight is not used, and must not draw from the random generator of the model
        router = Router(1, config.moe)
    router.to_empty(device=device).reset_buffers()
    router.requires_grad_(not frozen)
    return router


def _example_activation(model: Decoder, batch_size: int, device: torch.device | str = "meta") -> Tensor:
    """What a stage hands to the next one: (B, S, hidden), in the dtype of the parameters also under autocast.

    On the meta device it tells torch the shape, and by requires_grad that a gradient comes back for it.
    """
    dtype, config = next(model.parameters()).dtype, model.config
    return torch.empty(
        batch_size, config.max_seq_len, config.hidden, dtype=dtype, device=device, requires_grad=device == "meta"
    )


def _schedule(
    config: PipelineConfig, stages: list[TrackedStage], num_micro: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> Schedule1F1B | ScheduleInterleaved1F1B:
    # scale_grads would divide gradients by the number of micro-batches: the loss is divided by the batch's targets.
    if config.schedule == "1f1b":
        return Schedule1F1B(stages[0], num_micro, loss_fn=loss, scale_grads=False)
    return ScheduleInterleaved1F1B([*stages], num_micro, loss_fn=loss, scale_grads=False)
