"""What the driver tells every rank of a job."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dispatch.laws import BalanceConfig
from workers.data.mix import MixSchedule
from workers.distributed.parallel import ParallelConfig
from workers.model.model_config import ModelConfig
from workers.record.run_fence import RunFence
from workers.run_config import RunConfig
from workers.training.aux_losses import AuxLossConfig
from workers.training.fault_plan import Fault
from workers.training.optimizer import OptimConfig


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that a rank is told before it starts; the same on every rank.

    data_dir: prepared tokens (workers.data.prepare), None for ranks that only generate. tokenizer: the file of the
    tokenizer that made them, None for bytes. mix: weights of the sources in a batch. control_timeout_s: bounds the
    control of one step. record_scores_every: steps from one record of the router scores to the next, 0 for none.
    call_coordinator: takes a wire message to the coordinator and returns its answer, or raises within a bounded time;
    only rank 0 calls it; None lets rank 0 apply the law. fence: tells whether run_dir still belongs to this run.
    faults: what is to go wrong, for tests.
    """

    run_dir: Path
    run_id: str
    data_dir: Path | None
    tokenizer: str | None
    run: RunConfig
    mix: MixSchedule = field(default_factory=MixSchedule)
    model: ModelConfig
    balance: BalanceConfig
    optim: OptimConfig
    parallel: ParallelConfig
    aux: AuxLossConfig = field(default_factory=AuxLossConfig)
    device: str = "auto"
    control_timeout_s: float = 60.0
    record_scores_every: int = 0
    call_coordinator: Callable[[bytes], bytes] | None = None
    fence: RunFence | None = None
    faults: tuple[Fault, ...] = ()
