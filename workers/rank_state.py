"""What one rank builds once it knows its place: data, model, optimizer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dispatch.activity import Activity
from dispatch.aux_losses import AuxLossConfig
from dispatch.balance import attach_law, layout_of, read_bias, routers_of, write_state
from dispatch.board import Board
from dispatch.factory import make_dispatcher
from dispatch.laws import BalanceConfig, Law, LawState, make_law
from dispatch.layer import name_layers
from dispatch.layout import LoadLayout
from dispatch.meter import Meter
from dispatch.recycler import Recycler
from dispatch.router import Router
from workers.control import ControlLoop
from workers.faults import Fault, FaultPlan
from workers.freezing import freeze
from workers.init import init_weights
from workers.mix import MixSchedule
from workers.model import Decoder, ModelConfig
from workers.optimizer import OptimConfig, build_optimizer
from workers.parallel import ParallelConfig, RankGroups
from workers.run_config import RunConfig
from workers.run_fence import RunFence
from workers.sampler import Sampler
from workers.shards import Dataset


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that a rank is told before it starts; the same on every rank.

    data_dir: prepared tokens (workers.prepare), None for ranks that only generate. tokenizer: the file that made them,
    None for bytes. mix: weights of the sources in a batch. control_timeout_s: bounds the control of one step.
    record_scores_every: steps from one record of the router scores to the next, 0 for none. call_coordinator: takes a
    wire message to the coordinator and returns its answer, within a bound; only rank 0 calls it. None lets rank 0 apply
    the law. fence: shows whether run_dir is still this run's, where it has an owner. faults: what is to go wrong, for
    tests.
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


@dataclass(frozen=True)
class RankState:
    """The live objects of one rank."""

    spec: WorkerSpec
    groups: RankGroups
    text: tuple[Dataset, Sampler] | None
    meter: Meter
    model: Decoder
    optimizer: torch.optim.AdamW
    routers: dict[str, Router]
    law: Law
    control_board: Board

    @property
    def dataset(self) -> Dataset:
        """The text, of ranks that were given any."""
        return self._text[0]

    @property
    def sampler(self) -> Sampler:
        """What each rank reads of the text at each step."""
        return self._text[1]

    @property
    def _text(self) -> tuple[Dataset, Sampler]:
        if self.text is None:
            raise RuntimeError("these ranks were built without text: they can only generate")
        return self.text

    @property
    def layout(self) -> LoadLayout:
        """How the MoE layers lie in vectors of load and bias."""
        return self.law.layout

    def open_control(self) -> ControlLoop:
        """The control path of this rank; all ranks open it together, close it when training ends."""
        return ControlLoop(
            group=self.groups.control_group,
            law=self.law,
            run_id=self.spec.run_id,
            read_bias=self._read_bias,
            write_state=self._write_state,
            coordinator=self.spec.call_coordinator if self.groups.rank == 0 else None,
            timeout_s=self.spec.control_timeout_s,
            on_bias_mismatch=self.spec.run.on_bias_mismatch,
            board=self.control_board,
        )

    def activity(self) -> dict[str, Activity]:
        """What the threads of this rank are in, for who watches it; from any thread."""
        return {"training": self.groups.board.read(), "control": self.control_board.read()}

    def _read_bias(self) -> Tensor:
        return read_bias(self.routers)

    def _write_state(self, state: LawState) -> None:
        write_state(self.routers, state)


def build_rank(spec: WorkerSpec, groups: RankGroups) -> RankState:
    """Open the data and build model and optimizer, with initial weights that do not depend on the layout of ranks."""
    text = None if spec.data_dir is None else _open_text(spec, spec.data_dir)
    control_board = Board()
    if spec.faults:
        groups.board.trigger = control_board.trigger = FaultPlan(spec.faults, groups.rank, spec.run_dir)
    meter = Meter(board=groups.board)
    model = _build_model(spec, groups, meter)
    freeze(model, spec.optim.freeze)
    name_layers(model, groups.board)
    routers = routers_of(model)
    law = make_law(spec.balance, layout_of(routers))
    attach_law(routers, law)  # for evaluation and generation too: the law says how the bias enters the choice
    return RankState(
        spec=spec,
        groups=groups,
        text=text,
        meter=meter,
        model=model,
        optimizer=build_optimizer(model, spec.optim),
        routers=routers,
        law=law,
        control_board=control_board,
    )


def _open_text(spec: WorkerSpec, data_dir: Path) -> tuple[Dataset, Sampler]:
    dataset = Dataset.open(data_dir)
    return dataset, Sampler(dataset, spec.model.max_seq_len, spec.run.global_batch_size, spec.run.seed, spec.mix)


def _build_model(spec: WorkerSpec, groups: RankGroups, meter: Meter) -> Decoder:
    moe = spec.model.moe
    # One for all layers: it holds nothing of a step, and what it keeps, such as DeepEP's buffer, is there once.
    dispatcher = make_dispatcher(
        moe.num_experts,
        groups.ep_group,
        hidden=spec.model.hidden,
        top_k=moe.top_k,
        exchange=spec.parallel.exchange,
        payload=spec.parallel.payload,
        nodes=groups.nodes,
        meter=meter,
        recycler=Recycler(),
    )
    # On meta first: weights are drawn once, on the device where they stay.
    with torch.device("meta"):
        model = Decoder(spec.model, lambda: dispatcher, spec.parallel.schedule)
    model.to_empty(device=groups.device)
    init_weights(model, spec.run.seed)
    return model
