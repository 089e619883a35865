"""One optimizer step of one rank, and what it measured."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dispatch.balance import read_counts, reset_counts
from dispatch.diagnosis.meter import Meter
from dispatch.errors import UserError
from dispatch.routing.router import Router
from workers.control.loop import ControlLoop, StepControl
from workers.data.sampler import Sampler
from workers.distributed.parallel import RankGroups, Shard
from workers.model.decoder import Decoder
from workers.run_config import RunConfig
from workers.training.aux_losses import AuxLossConfig, AuxLosses
from workers.training.expert_copies import CopiesPlaced, ExpertCopying
from workers.training.gradients import clip_gradients, global_grad_norm, reduce_gradients
from workers.training.lr_schedule import learning_rate
from workers.training.offload import HostStates
from workers.training.optimizer import PIECE_BYTES, OptimConfig
from workers.training.own_part import OwnPart, own_part
from workers.training.sharding import set_sync
from workers.training.summed_metrics import RankStep, metrics_from_sums, values_to_sum

if TYPE_CHECKING:
    from workers.training.pipeline import Pipeline

# A step with a gradient that is not finite is skipped, as one bad batch would poison the weights. This many in a row
# are not bad batches but a diverged model.
MAX_SKIPPED_STEPS = 20


class TrainingDiverged(UserError, RuntimeError):
    """The gradient was not finite for many steps in a row."""


@dataclass(frozen=True)
class StepResult:
    """What one step did. `summed` and `control` are over all ranks; seconds and bytes are this rank's.

    summed: by name in metrics.jsonl, see workers.training.summed_metrics. skipped: the gradient was not finite, and
    neither weights nor bias changed. num_tokens: of the global batch. seconds: by phase of the exchange, forward and
    backward together. placed: the new placement of copies of hot experts, used from the next step on; None: no change.
    """

    step: int
    summed: dict[str, float | None]
    lr: float
    grad_norm: float
    skipped: bool
    step_s: float
    num_tokens: int
    seconds: dict[str, float]
    sent_bytes: int
    max_vio_computation_batch: float
    control: StepControl
    placed: CopiesPlaced | None


@dataclass
class Trainer:
    """Steps a model on this rank; every rank of the gang calls `step` together.

    routers: those of `model`; with a pipeline, of all stages (`workers.training.pipeline.routers_of_all`).
    """

    model: Decoder
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    groups: RankGroups
    control: ControlLoop
    meter: Meter
    run: RunConfig
    optim: OptimConfig
    aux: AuxLossConfig
    shard: Shard
    routers: Mapping[str, Router]
    pipeline: "Pipeline | None"
    copying: ExpertCopying | None

    def __post_init__(self) -> None:
        self.num_micro = self.run.num_micro_batches(self.groups.num_shares)
        self.num_step_tokens = self.run.global_batch_size * self.model.config.max_seq_len
        self.num_skipped_in_a_row = 0
        self.update_weights: Callable[[], object] = self.optimizer.step
        if self.optim.offload == "states":
            host_states = HostStates(self.model, self.optimizer, self.optim.initial_state, PIECE_BYTES)
            self.update_weights = host_states.step
        self.aux_losses = None
        if self.aux.active:
            self.aux_losses = AuxLosses(self.model, self.aux, self.groups.world_group, self.groups.tracker)

    def step(self, step: int, *, stop_requested: bool = False) -> StepResult:
        """Forward and backward over all micro-batches, one optimizer update, one bias update.

        Args:
            step: number of this update, from 1.
            stop_requested: this rank's wish to end; all ranks agree on it in the result's control.stop.
        Raises:
            TrainingDiverged: the gradient was not finite for MAX_SKIPPED_STEPS steps.
        """
        began = time.perf_counter()
        tracker = self.groups.tracker
        tracker.step = step
        tracker.set_phase("forward")
        lr = learning_rate(step - 1, self.run.steps, self.optim)
        run_step = self._accumulate if self.pipeline is None else self._run_pipeline
        # At least 1: in fine-tuning a batch may have no token to learn, and the loss is divided by this.
        measured = run_step(step, max(1, self.sampler.num_targets(step - 1)), stop_requested)
        grad_norm, finite = self._update(lr)
        reset_counts(self.routers)
        tracker.set_phase("bias update")
        # A skipped step leaves the bias as it is too: it must not move when the weights that caused the load do not.
        control = self.control.finish_step(apply=finite)
        self._watch_divergence(step, finite, grad_norm)
        # After a skipped step the copies still have the weights of their owners.
        placed = self._renew_copies(step, control.load_N) if finite else None
        forward, backward = measured.moved, self.meter.take()
        return StepResult(
            step=step,
            summed=metrics_from_sums(measured, control.sums, control.floats),
            lr=lr,
            grad_norm=grad_norm,
            skipped=not finite,
            step_s=time.perf_counter() - began,
            num_tokens=self.num_step_tokens,
            seconds={phase: forward.seconds[phase] + backward.seconds[phase] for phase in forward.seconds},
            sent_bytes=forward.sent_bytes + backward.sent_bytes,
            max_vio_computation_batch=self._computation_vio(control.maxima),
            control=control,
            placed=placed,
        )

    def _accumulate(self, step: int, num_targets: int, stop_requested: bool) -> RankStep:
        """Forward and backward of one micro-batch after the other.

        num_targets: of the global batch, which the loss is divided by. Gradients are then sums over micro-batches and
        ranks, and never rescaled: they are those of one process, however the batch is divided.
        """
        tracker = self.groups.tracker
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if self.aux_losses is not None:
            self.aux_losses.begin_step()
        for micro, batch in enumerate(self._micro_batches(step)):
            nll_sum, total = self._forward(batch, num_targets)
            loss_sum += nll_sum
            if micro == self.num_micro - 1:
                # Before the last backward: all tokens of the step are routed, and the load can travel beside it.
                measured = self._report(step, loss_sum, num_targets, stop_requested)
            tracker.set_phase("backward")
            set_sync(self.model, self.shard, is_last=micro == self.num_micro - 1)
            (total / num_targets).backward()
            tracker.set_phase("forward")
        return measured

    def _run_pipeline(self, step: int, num_targets: int, stop_requested: bool) -> RankStep:
        """As `_accumulate`, through the pipeline stages of all ranks."""
        if self.pipeline is None:
            raise RuntimeError("this rank is in no pipeline")
        measured: list[RankStep] = []  # filled by `report`, after this rank's last forward

        def report(nll_sum: Tensor) -> None:
            measured.append(self._report(step, nll_sum, num_targets, stop_requested))

        self.pipeline.step(list(self._micro_batches(step)), num_targets, report)
        return measured[0]

    def _forward(self, batch: OwnPart, num_targets: int) -> tuple[Tensor, Tensor]:
        """Return the language model's summed loss, detached, and the summed loss to train on."""
        has_mtp = self.model.config.num_mtp_layers > 0
        # No cache: a forward casts each weight once. A cache would only keep the bf16 copies of all blocks until its
        # end, which recompute frees block by block.
        with autocast(self.run.dtype, self.groups.device, cache_enabled=False):
            # Called as a module and not by `forward`: FSDP gathers the weights in hooks.
            predicted = self.model(
                batch.input_ids,
                document_starts=batch.document_starts,
                context=self.groups.context,
                further_targets=batch.further_targets,
                next_ids=batch.targets if has_mtp else None,
                targets=batch.targets,
            )
        loss, further = predicted if has_mtp else (predicted, None)
        nll_sum = loss.total
        total = nll_sum
        if self.aux_losses is not None:
            # Auxiliary losses are sums over all tokens; the caller divides by the tokens that are learned (targets).
            total = nll_sum + self.aux_losses.take() * (num_targets / self.num_step_tokens)
        if further is not None:
            total = total + self.optim.mtp_weight * further.total
        return nll_sum.detach(), total

    def _micro_batches(self, step: int) -> Iterator[OwnPart]:
        groups, place = self.groups, (self.groups.share, self.groups.num_shares)
        for micro in range(self.num_micro):
            batch = self.sampler.batch(step - 1, *place, micro, self.num_micro)
            yield own_part(batch.to(groups.device), groups.context)

    def _report(self, step: int, nll_sum: Tensor, num_targets: int, stop_requested: bool) -> RankStep:
        """Hand what this rank measured in its forwards to the control path, which sums it over all ranks."""
        balance_sum, z_sum = self.aux_losses.sums if self.aux_losses is not None else (None, None)
        measured = RankStep(
            moved=self.meter.take(),
            nll_sum=nll_sum,
            balance_sum=balance_sum if self.aux.balances else None,
            z_sum=z_sum if self.aux.z_alpha > 0 else None,
            num_targets=num_targets,
            num_tokens=self.num_step_tokens,
        )
        sums, floats = values_to_sum(measured)
        rows = measured.moved.busiest_rows
        maxima = torch.tensor(rows, dtype=torch.int64) if self.pipeline is None else self.pipeline.busiest_rows(rows)
        self.control.begin_step(
            step,
            read_counts(self.routers),
            sums=sums,
            floats=floats,
            maxima=maxima,
            stop_requested=stop_requested,
        )
        return measured

    def _update(self, lr: float) -> tuple[float, bool]:
        """Reduce and clip the gradients and update the weights. Returns the gradient norm, and whether it is finite."""
        tracker = self.groups.tracker
        tracker.set_phase("gradients")
        if self.copying is not None:
            self.copying.sum_gradients()  # first: owners then reduce what their copies have added
        reduce_gradients(self.model, self.groups)
        if self.pipeline is not None:
            self.pipeline.sum_shared_gradients()
        tracker.set_phase("gradient norm")
        grad_norm = global_grad_norm(self.model, self.groups)
        tracker.set_phase("optimizer")
        finite = math.isfinite(grad_norm)  # the norm has the same bits on all ranks, so all of them skip or none does
        if finite:
            clip_gradients(self.model, grad_norm, self.optim.grad_clip)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            self.update_weights()
        self.optimizer.zero_grad()
        return grad_norm, finite

    def _renew_copies(self, step: int, load_N: Tensor) -> CopiesPlaced | None:
        if self.copying is None:
            return None
        self.groups.tracker.set_phase("expert copies")
        return self.copying.end_step(step, load_N)

    def _watch_divergence(self, step: int, finite: bool, grad_norm: float) -> None:
        self.num_skipped_in_a_row = 0 if finite else self.num_skipped_in_a_row + 1
        if self.num_skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"step {step}: the gradient norm was {grad_norm} for {MAX_SKIPPED_STEPS} steps in a row, and no weight "
                "was changed in them; resume from an earlier checkpoint with a lower --optim.lr"
            )

    def _computation_vio(self, busiest_rows: Tensor) -> float:
        """MaxVio of the tokens that one EP group computes at once, averaged over layers and micro-batches.

        busiest_rows: int64, for each layer of each micro-batch the rows of the busiest expert on any rank.
        """
        if not busiest_rows.numel():
            return 0.0
        moe = self.model.config.moe
        tokens = self.num_step_tokens // (self.num_micro * self.groups.edp_size)
        return float(busiest_rows.double().mean()) * moe.num_experts / (tokens * moe.top_k) - 1


def autocast(dtype: str, device: torch.device, *, cache_enabled: bool = True) -> AbstractContextManager[None]:
    """A context that computes in `dtype`: autocast for bfloat16, nothing for float32. Parameters and router stay fp32.

    cache_enabled: keep the bf16 copies of dense weights until the context ends, for further forwards in it.
    """
    if dtype != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_enabled)
