"""One optimizer step of one rank, and what it measured."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatch.aux_losses import AuxLossConfig, AuxLosses
from dispatch.balance import read_counts, reset_counts, routers_of
from dispatch.errors import UserError
from dispatch.meter import Meter, Reading
from workers.control import ControlLoop, StepControl
from workers.gradients import clip_gradients, global_grad_norm, reduce_gradients
from workers.model import Decoder, after_next, token_nll_sum
from workers.optimizer import OptimConfig, learning_rate
from workers.parallel import RankGroups
from workers.run_config import RunConfig
from workers.sampler import Batch, Sampler

# A step with a gradient that is not finite is skipped, as one bad batch would poison the weights. This many in a row
# are not bad batches but a diverged model.
MAX_SKIPPED_STEPS = 20


class TrainingDiverged(UserError, RuntimeError):
    """The gradient was not finite for many steps in a row."""


@dataclass(frozen=True)
class StepResult:
    """What one step did. Losses, counts and control are of all ranks, seconds and bytes of this one.

    aux_loss, z_loss: unweighted, mean over layers; None where that loss is off.
    """

    step: int
    loss: float  # nats per target over the global batch, of the language model alone
    aux_loss: float | None
    z_loss: float | None
    lr: float
    grad_norm: float
    skipped: bool
    step_s: float
    num_tokens: int
    seconds: dict[str, float]
    sent_bytes: int
    assignments: dict[str, int]  # routed, sent, received, returned over all ranks
    max_vio_computation_batch: float
    control: StepControl


@dataclass
class Trainer:
    """Steps a model on this rank; every rank of the gang calls `step` together."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    groups: RankGroups
    control: ControlLoop
    meter: Meter
    run: RunConfig
    optim: OptimConfig
    aux: AuxLossConfig

    def __post_init__(self) -> None:
        self.routers = routers_of(self.model)
        self.num_micro = self.run.num_micro_batches(self.groups.world_size)
        self.num_step_tokens = self.run.global_batch_size * self.model.config.max_seq_len
        self.num_skipped_in_a_row = 0
        self.aux_losses = AuxLosses(self.model, self.aux, self.groups.world_group) if self.aux.active else None

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 compute where the run asks for it; parameters, gate and optimizer stay fp32."""
        return autocast(self.run.dtype, self.groups.device)

    def step(self, step: int, *, stop_requested: bool = False) -> StepResult:
        """Forward and backward over all micro-batches, one optimizer update, one bias update.

        Args:
            step: number of this update, from 1.
            stop_requested: this rank's wish to end; all ranks agree on it in the result's control.stop.
        Raises:
            TrainingDiverged: the gradient was not finite for MAX_SKIPPED_STEPS steps.
        """
        began = time.perf_counter()
        board = self.groups.board
        board.step = step
        board.enter("forward")
        lr = learning_rate(step - 1, self.run.steps, self.optim)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        if self.aux_losses is not None:
            self.aux_losses.begin_step()
        num_targets = max(1, self.sampler.num_targets(step - 1))  # of all ranks and micro-batches
        for micro, batch in enumerate(self._micro_batches(step)):
            nll_sum, total = self._forward(batch, num_targets)
            loss_sum += nll_sum
            if micro == self.num_micro - 1:
                # All tokens of the step are routed: the load travels while backward runs.
                forward = self._report(step, loss_sum, stop_requested)
            # Divided by the targets of all ranks and micro-batches: gradients are then summed and never rescaled.
            board.enter("backward")
            (total / num_targets).backward()
            board.enter("forward")
        grad_norm, finite = self._update(lr)
        reset_counts(self.routers)
        board.enter("bias update")
        # On a skipped step the bias stays too, or it would move without the weights that caused the load.
        control = self.control.finish_step(apply=finite)
        self._watch_divergence(step, finite, grad_norm)
        backward = self.meter.take()
        return StepResult(
            step=step,
            **self._losses(control.floats, num_targets),
            lr=lr,
            grad_norm=grad_norm,
            skipped=not finite,
            step_s=time.perf_counter() - began,
            num_tokens=self.num_step_tokens,
            seconds={phase: forward.seconds[phase] + backward.seconds[phase] for phase in forward.seconds},
            sent_bytes=forward.sent_bytes + backward.sent_bytes,
            assignments=dict(zip(("routed", "sent", "received", "returned"), control.sums.tolist(), strict=True)),
            max_vio_computation_batch=self._computation_vio(control.maxima),
            control=control,
        )

    def _forward(self, batch: Batch, num_targets: int) -> tuple[Tensor, Tensor]:
        """The language model's summed loss, without gradient, and what is trained on.

        A function of its own: the logits, the largest tensors of all, must not live on while backward runs.
        """
        has_mtp = self.model.config.num_mtp_layers > 0
        with self.autocast():
            # Called as a module, so that hooks on it run.
            predicted = self.model(
                batch.input_ids,
                document_starts=batch.document_starts,
                next_ids=batch.targets if has_mtp else None,
            )
            logits, further = predicted if has_mtp else (predicted, None)
            nll_sum = token_nll_sum(logits, batch.targets)
        # Without auxiliary losses the graph is that of the language model, with nothing added. They are sums over all
        # tokens, not over those that are learned.
        total = nll_sum
        if self.aux_losses is not None:
            total = nll_sum + self.aux_losses.take() * (num_targets / self.num_step_tokens)
        if further is not None:
            total = total + self.optim.mtp_weight * token_nll_sum(further, after_next(batch.targets))
        return nll_sum.detach(), total

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        place = (self.groups.rank, self.groups.world_size)
        for micro in range(self.num_micro):
            yield self.sampler.batch(step - 1, *place, micro, self.num_micro).to(self.groups.device)

    def _report(self, step: int, loss_sum: Tensor, stop_requested: bool) -> Reading:
        forward = self.meter.take()
        self.control.begin_step(
            step,
            read_counts(self.routers),
            sums=torch.tensor([forward.routed, forward.sent, forward.received, forward.returned]),
            floats=self._loss_sums(loss_sum),
            maxima=torch.tensor(forward.busiest_rows, dtype=torch.int64),
            stop_requested=stop_requested,
        )
        return forward

    def _loss_sums(self, loss_sum: Tensor) -> Tensor:
        sums = [loss_sum.reshape(1)] if self.aux_losses is None else [loss_sum.reshape(1), self.aux_losses.sums]
        return torch.cat(sums).cpu()

    def _losses(self, sums: Tensor, num_targets: int) -> dict[str, Any]:
        """From `_loss_sums` over all ranks to the losses of the global batch."""
        loss, others = float(sums[0]) / num_targets, (sums[1:] / self.num_step_tokens).tolist()
        balance, z = others or (None, None)
        return {
            "loss": loss,
            "aux_loss": balance if self.aux.balances else None,
            "z_loss": z if self.aux.z_alpha > 0 else None,
        }

    def _update(self, lr: float) -> tuple[float, bool]:
        board = self.groups.board
        board.enter("gradients")
        if not board.leaves_out("gradients"):
            reduce_gradients(self.model, self.groups)
        board.enter("gradient norm")
        grad_norm = global_grad_norm(self.model, self.groups)
        board.enter("optimizer")
        finite = math.isfinite(grad_norm)
        if finite:
            clip_gradients(self.model, grad_norm, self.optim.grad_clip)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm, finite

    def _watch_divergence(self, step: int, finite: bool, grad_norm: float) -> None:
        self.num_skipped_in_a_row = 0 if finite else self.num_skipped_in_a_row + 1
        if self.num_skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"step {step}: the gradient norm was {grad_norm} for {MAX_SKIPPED_STEPS} steps in a row, and no weight "
                "was changed in them; resume from an earlier checkpoint with a lower --optim.lr"
            )

    def _computation_vio(self, busiest_rows: Tensor) -> float:
        """MaxVio of what one EP group computes at once, the worst EP group, averaged over layers and micro-batches."""
        if not busiest_rows.numel():
            return 0.0
        moe = self.model.config.moe
        tokens = self.num_step_tokens // (self.num_micro * self.groups.edp_size)
        return float(busiest_rows.double().mean()) * moe.num_experts / (tokens * moe.top_k) - 1


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    """A context that computes in `dtype`: autocast for bfloat16, nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
