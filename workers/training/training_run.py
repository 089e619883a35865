"""The training loop: steps, evaluations and checkpoints from the first or resumed step to the last, recorded."""

import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dispatch.balance import read_bias
from dispatch.errors import InvalidValue
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import CHECKPOINTS, MANIFEST, CheckpointCorrupt, read_manifest
from workers.checkpoints.memory_checkpoint import MemoryCheckpoints
from workers.checkpoints.staging import Snapshot
from workers.checkpoints.state import law_state, law_tensors, random_state, set_random_state
from workers.control.loop import ControlLoop
from workers.model.flops import ModelFlops, linear_weights
from workers.record.run_log import RunLog
from workers.record.score_log import ScoreLog
from workers.training.metrics import eval_line, train_line
from workers.training.outcome import TrainOutcome
from workers.training.rank_state import RankState
from workers.training.samples import SampleTaker
from workers.training.saver import CheckpointSaver
from workers.training.step import StepResult


class TrainingRun:
    """One rank's part of a run. All ranks make it and call `run` together.

    Args:
        state: what `build_rank` built.
        control: from `state.open_control()`.
        publish: called with each metrics line and event, and when the last checkpoint begins; the driver shows what
            rank 0 publishes.
        stop_requested: set by this process when it wishes to end.
        memory: memory checkpoints of this process, which outlive the gang; None if nobody will read them.
        nodes: the node of each rank; empty where it is not known.
    """

    def __init__(
        self,
        state: RankState,
        control: ControlLoop,
        *,
        publish: Callable[[dict[str, Any]], None],
        stop_requested: threading.Event,
        memory: MemoryCheckpoints | None = None,
        nodes: tuple[int, ...] = (),
    ) -> None:
        self._state, self._control = state, control
        self._log: RunLog | None = None
        self._publish, self._stop_requested = publish, stop_requested
        self._memory, self._nodes = memory or MemoryCheckpoints(), nodes
        self._load_since_eval_N = torch.zeros(state.layout.total, dtype=torch.int64)
        self._samples = SampleTaker(state) if state.spec.run.sample_prompts else None
        num_linear = None if state.pipeline is None else state.pipeline.sum_over_stages(linear_weights(state.model))
        self._flops = ModelFlops.of(state.model, state.groups.device, state.groups.world_size, num_linear)
        self.trainer = state.trainer(control)

    def load(self, path: Path) -> int:
        """Go on from a checkpoint, at any world and EP size. Returns its step.

        Raises:
            CheckpointCorrupt, CheckpointError: on every rank.
            InvalidValue: the checkpoint was trained on other text.
        """
        if read_manifest(path).extra.get("imported"):
            return self._load_imported(path)
        tensors = self._tensors()
        extra = checkpoint.load(path, tensors, self._state.groups.control_group)
        self._check_extra(path, extra)
        if extra["data_digest"] != self._state.dataset.digest:
            raise InvalidValue(
                f"{path} was trained on other text or with another tokenizer than what data.* names now; resume with "
                f"the data settings of the run, or start a new run"
            )
        set_random_state(tensors, self._state.groups.rank, self._state.groups.device)
        self._control.restore(extra["bias_version"], law_state(tensors))
        self._load_since_eval_N = torch.tensor(extra["load_since_eval"], dtype=torch.int64)
        return int(extra["step"])

    def _check_extra(self, path: Path, extra: dict[str, Any]) -> None:
        """Raise CheckpointCorrupt for extra values that no run saves. All ranks read the same values."""
        kinds = {"step": int, "bias_version": int, "data_digest": str, "load_since_eval": list}
        wrong = [name for name, kind in kinds.items() if type(extra.get(name)) is not kind]
        if not wrong:
            loads = extra["load_since_eval"]
            if len(loads) != self._state.layout.total or any(type(load) is not int or load < 0 for load in loads):
                wrong = ["load_since_eval"]
        if wrong:
            raise CheckpointCorrupt(path, MANIFEST, f"has no {' and no '.join(wrong)} as a run saves it")

    def _load_imported(self, path: Path) -> int:
        """Begin with the weights and biases of an imported model, which has no optimizer state and no data position."""
        state = self._state
        state.load_weights(path)
        version, initial = self._control.state()
        self._control.restore(version, replace(initial, bias_N=read_bias(state.routers)))
        return 0

    def run(self, done: int, log: RunLog | None, scores: ScoreLog | None = None) -> TrainOutcome:
        """Train from step `done` + 1 on, to the last step or until a rank wishes to stop; then save.

        log: rank 0's record of the run; None on the others. scores: this rank's record of what its routers score.
        """
        self._log = log
        config = self._state.spec.run
        step, stop = done, False
        if step == 0 and config.eval_every:
            self._evaluate(step)  # what training starts from
        with self._open_saver() as saver:
            while step < config.steps and not stop:
                step += 1
                if scores is not None:
                    scores.begin_step(step)
                result = self.trainer.step(step, stop_requested=self._stop_requested.is_set())
                stop = result.control.stop
                self._record(result)
                if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                    self._evaluate(step)
                if step < config.steps and not stop:
                    saver.after_step(step, self._snapshot)
            if step > done:
                self._publish({"kind": "saving", "step": step})
                saver.save_last(self._snapshot(step), self._stop_requested)
        completed = step >= config.steps
        self.tell("finished" if completed else "interrupted", step=step, **saver.summary())
        return TrainOutcome(step, completed)

    def _record(self, result: StepResult) -> None:
        self._state.groups.tracker.set_phase("record")
        self._load_since_eval_N += result.control.load_N
        for event in result.control.events:
            self.tell(**event)
        if result.placed is not None:
            self.tell("copies_placed", step=result.step, **asdict(result.placed))
        if self._log is not None:
            line = train_line(result, self._state.layout, self._state.spec.model.moe.top_k, self._flops)
            self._log.train(line)
            control = result.control
            self._log.load(result.step, control.load_N, control.bias_N, control.statistic)
            self._publish(line)

    def _evaluate(self, step: int) -> None:
        state = self._state
        evaluation = state.evaluate(state.spec.run.eval_sequences)
        samples = [] if self._samples is None else self._samples.take()
        state.meter.take()  # discarded: what evaluation sent must not count for the next step
        if self._log is not None:
            line = eval_line(step, evaluation, self._load_since_eval_N, state.layout, state.spec.mix.weights_at(step))
            self._log.eval(line)
            self._log.samples(step, samples)
            self._publish(line)
        self._load_since_eval_N.zero_()

    def _open_saver(self) -> CheckpointSaver:
        state = self._state
        return CheckpointSaver(
            state.spec.run_dir / CHECKPOINTS,
            state.groups,
            state.spec.run,
            state.optimizer,
            self._memory,
            nodes=self._nodes,
            tell=self.tell,
            sync_records=self._log.sync if self._log is not None else lambda: None,  # rank 0 alone keeps records
        )

    def _snapshot(self, step: int) -> Snapshot:
        state = self._state
        state.groups.tracker.set_phase("checkpoint write")
        version, _ = self._control.state()
        extra = {
            "step": step,
            "bias_version": version,
            "load_since_eval": self._load_since_eval_N.tolist(),
            "data_digest": state.dataset.digest,
            "model": asdict(state.spec.model),
            "optimizer": state.spec.optim.name,
            "seed": state.spec.run.seed,
        }
        return Snapshot(step, self._tensors(), extra)

    def _tensors(self) -> dict[str, torch.Tensor]:
        state = self._state
        return {
            **state.tensors(state.optimizer),
            **law_tensors(self._control.state()[1]),
            **random_state(state.groups.rank, state.groups.device),
        }

    def tell(self, event: str, **details: Any) -> None:
        """Record and publish an event on rank 0; do nothing on the other ranks."""
        if self._log is not None:
            self._log.event(event, **details)
            self._publish({"event": event, **details})
