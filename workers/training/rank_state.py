"""Builds data, model and optimizer of a rank, once the rank knows its process groups."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dispatch.balance import attach_law, layout_of, read_bias, routers_of, write_state
from dispatch.diagnosis.activity import Activity
from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.diagnosis.meter import Meter
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.factory import make_dispatcher
from dispatch.laws import Law
from dispatch.layer import name_layers
from dispatch.layout import LoadLayout
from dispatch.routing.router import Router
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import read_manifest
from workers.checkpoints.state import canonical_state
from workers.control.loop import ControlLoop
from workers.data.sampler import Sampler
from workers.data.shards import Dataset
from workers.distributed.memory import held_bytes
from workers.distributed.parallel import RankGroups
from workers.model.decoder import Decoder
from workers.model.freezing import freeze, freezes_router
from workers.model.init import init_weights
from workers.model.lora import without_adapters
from workers.model.meta_device import meta_device
from workers.training.evaluation import Evaluation, evaluate
from workers.training.expert_copies import expert_copying
from workers.training.optimizer import build_optimizer
from workers.training.sharding import shard_states
from workers.training.step import Trainer, autocast
from workers.training.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from workers.training.pipeline import Pipeline


@dataclass(frozen=True)
class RankState:
    """The live objects of one rank.

    text: None for ranks that can only generate. model: with a pipeline, the layers of this rank's stages. routers: by
    name; with a pipeline of all stages, see `routers_of_all`.
    """

    spec: WorkerSpec
    groups: RankGroups
    text: tuple[Dataset, Sampler] | None
    meter: Meter
    model: Decoder
    routers: dict[str, Router]
    law: Law
    control_tracker: ActivityTracker
    pipeline: "Pipeline | None" = None

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, built at its first use: ranks that only evaluate or generate start sooner without."""
        return build_optimizer(self.model, self.spec.optim)

    @property
    def dataset(self) -> Dataset:
        """The text. Raises RuntimeError on ranks that can only generate."""
        return self._text[0]

    @property
    def sampler(self) -> Sampler:
        """Decides what each rank reads of the text at each step. Raises as `dataset`."""
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

    def autocast(self) -> AbstractContextManager[None]:
        """A new context that computes in the run's dtype, for forwards without gradients.

        Generation makes many forwards in it, for which it keeps bf16 copies of dense weights. Not with shard `full`,
        where copies of all blocks would stay that are otherwise gathered and freed one by one.
        """
        return autocast(self.spec.run.dtype, self.groups.device, cache_enabled=self.spec.parallel.shard != "full")

    def open_control(self) -> ControlLoop:
        """The control path of this rank. All ranks open it together, and close it when training ends."""
        return ControlLoop(
            group=self.groups.control_group,
            law=self.law,
            run_id=self.spec.run_id,
            read_bias=partial(read_bias, self.routers),
            write_state=partial(write_state, self.routers),
            coordinator=self.spec.call_coordinator if self.groups.rank == 0 else None,
            timeout_s=self.spec.control_timeout_s,
            on_bias_mismatch=self.spec.run.on_bias_mismatch,
            tracker=self.control_tracker,
        )

    def trainer(self, control: ControlLoop) -> Trainer:
        """The trainer of this rank. control: from `open_control`."""
        spec = self.spec
        return Trainer(
            model=self.model,
            optimizer=self.optimizer,
            sampler=self.sampler,
            groups=self.groups,
            control=control,
            meter=self.meter,
            run=spec.run,
            optim=spec.optim,
            aux=spec.aux,
            shard=spec.parallel.shard,
            routers=self.routers,
            pipeline=self.pipeline,
            copying=expert_copying(self.model, self.layout, spec.parallel, self.groups),
        )

    def tensors(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
        """What this rank holds of the model, and of its optimizer where one is given, by canonical name."""
        # With a pipeline, routers of other stages are not in `model`, but every rank holds and loads their biases.
        biases = {f"model.{name}.expert_bias_E": router.expert_bias_E for name, router in self.routers.items()}
        pipeline_biases = biases if self.pipeline is not None else {}
        return pipeline_biases | canonical_state(self.model, optimizer, self.spec.optim.initial_state)

    def load_weights(self, path: Path) -> None:
        """Read the model of a checkpoint. An imported one has no adapters: these stay as drawn. Collective."""
        weights = self.tensors()
        if read_manifest(path).extra.get("imported"):
            weights = without_adapters(weights)
        checkpoint.load(path, weights, self.groups.control_group, sections=("model",))

    def evaluate(self, num_sequences: int | None) -> Evaluation:
        """Measure the model on so many sequences of the held-out text, on all of it for None. Collective."""
        return evaluate(
            self.model,
            self.dataset,
            self.sampler,
            self.groups,
            batch_size=self.spec.run.sequences_at_once(self.groups.num_shares),
            num_sequences=num_sequences,
            autocast=self.autocast(),
            routers=self.routers,
            pipeline=self.pipeline,
        )

    def activity(self) -> dict[str, Activity]:
        """What the threads of this rank are doing, for the driver that watches it. From any thread."""
        training = replace(self.groups.tracker.read(), memory_bytes=held_bytes(self.groups.device))
        return {"training": training, "control": self.control_tracker.read()}


def build_rank(spec: WorkerSpec, groups: RankGroups) -> RankState:
    """Open the data and build model and optimizer, with initial weights that do not depend on the layout of ranks."""
    text = None if spec.data_dir is None else _open_text(spec, spec.data_dir)
    control_tracker = ActivityTracker()
    meter = Meter(tracker=groups.tracker)
    model = _build_model(spec, groups, meter)
    freeze(model, spec.optim.freeze)
    name_layers(model, groups.tracker)
    routers, pipeline = routers_of(model), None
    if groups.pipeline is not None:
        # Imported here, as it takes a second, for which runs without a pipeline need not wait.
        from workers.training.pipeline import Pipeline, routers_of_all

        frozen = freezes_router(spec.optim.freeze, spec.model.lora.rank)
        routers = routers_of_all(routers, spec.model, groups.device, frozen=frozen)
        forward_autocast = partial(autocast, spec.run.dtype, groups.device, cache_enabled=False)
        pipeline = Pipeline(model, spec.parallel, groups, spec.run, forward_autocast, spec.optim.mtp_weight)
    law = Law(spec.balance, layout_of(routers))
    attach_law(routers, law)  # evaluation and generation need it too: the law says how the bias enters the choice
    state = RankState(
        spec=spec,
        groups=groups,
        text=text,
        meter=meter,
        model=model,
        routers=routers,
        law=law,
        control_tracker=control_tracker,
        pipeline=pipeline,
    )
    if text is not None:
        _ = state.optimizer  # built now, so that a wrong setting is told before training begins
    return state


def _open_text(spec: WorkerSpec, data_dir: Path) -> tuple[Dataset, Sampler]:
    dataset = Dataset.open(data_dir)
    return dataset, Sampler(dataset, spec.model.max_seq_len, spec.run.global_batch_size, spec.run.seed, spec.mix)


def _build_model(spec: WorkerSpec, groups: RankGroups, meter: Meter) -> Decoder:
    moe = spec.model.moe
    # One dispatcher for all layers: it keeps no state of a step, and its buffers (DeepEP's) are allocated once.
    dispatcher = make_dispatcher(
        moe.num_experts,
        groups.ep_group,
        hidden=spec.model.hidden,
        top_k=moe.top_k,
        exchange=spec.parallel.exchange,
        payload=spec.parallel.payload,
        nodes=groups.nodes,
        meter=meter,
        buffer_pool=BufferPool(),
    )
    place = groups.pipeline
    layers = spec.parallel.pipeline.layers_of(place.rank, spec.model.num_layers) if place else None
    # Built and sharded on the meta device: no rank ever allocates more than its own rows, and weights are drawn once.
    with meta_device():
        model = Decoder(spec.model, lambda: dispatcher, spec.parallel.schedule, layers)
    shard_states(model, groups, spec.parallel.shard, spec.run.dtype)
    model.to_empty(device=groups.device)
    init_weights(model, spec.run.seed)
    return model
