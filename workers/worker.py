"""One rank of a gang, without Ray: join, then train, evaluate or generate."""

import gc
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dispatch.diagnosis.activity import Activity
from workers.checkpoints.checkpoint_files import CHECKPOINTS, CheckpointCorrupt, set_aside_later
from workers.checkpoints.memory_checkpoint import HeldShare, MemoryCheckpoints, write_held
from workers.data.tokenizer import load_tokenizer
from workers.distributed.exchange_choice import choose_exchange
from workers.distributed.heap import give_back_large_blocks
from workers.distributed.parallel import join_groups, local_device
from workers.generation.decoding import OnToken
from workers.generation.generate import SamplingConfig, Speed, encode_prompts, generate
from workers.record.record_check import find_holes, new_holes
from workers.record.run_log import METRICS, RunLog
from workers.record.score_log import ScoreLog, ScoreShape, set_aside_later_scores
from workers.training.evaluation import Evaluation
from workers.training.faults import FaultPlan, install
from workers.training.outcome import TrainOutcome
from workers.training.rank_state import RankState, build_rank
from workers.training.training_run import TrainingRun
from workers.training.worker_spec import WorkerSpec

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuations:
    """Continuations of this rank's share of the prompts, by index of the prompt, and the speed of generation."""

    texts: dict[int, str]
    speed: Speed


class Worker:
    """A rank. `join` first, then one of `train`, `evaluate` and `generate`, each called on all ranks together.

    `progress`, `activity` and `request_stop` may be called from another thread meanwhile.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._lines: list[dict[str, Any]] = []
        self._num_dropped = 0  # lines that the driver has and that are no longer in _lines
        self._last_activity: dict[str, Activity] = {}  # at the moment when this rank left its last gang
        self._stop_requested = threading.Event()
        self._memory = MemoryCheckpoints()
        self._nodes: tuple[int, ...] = ()
        self._joined: RankState | None = None  # between `join` and `leave`

    @property
    def _state(self) -> RankState:
        if self._joined is None:
            raise RuntimeError("the worker is in no gang: call join first")
        return self._joined

    def join(self, *, rank: int, world_size: int, store: Store, timeout_s: float, nodes: tuple[int, ...] = ()) -> None:
        """Form the process groups, and build data, model and optimizer. All ranks call it together.

        After `leave` a rank can join again, with another rank and world size. Of its last gang only memory checkpoints
        remain.

        nodes: the index of each rank's machine, by rank; empty where it is not known.
        """
        gc.collect()  # frees the last gang's model, optimizer and trainer, which refer to each other in cycles
        self._lines.clear()
        self._num_dropped = 0
        self._stop_requested.clear()
        spec = replace(self._spec, parallel=self._spec.parallel.resized_to(world_size))
        choice = choose_exchange(
            spec.parallel,
            nodes,
            world_size,
            num_experts=spec.model.moe.num_experts,
            hidden=spec.model.hidden,
            top_k=spec.model.moe.top_k,
        )
        spec = replace(spec, parallel=replace(spec.parallel, exchange=choice.exchange))
        self._nodes = nodes
        groups = join_groups(
            rank=rank,
            world_size=world_size,
            store=store,
            config=spec.parallel,
            device=local_device(self._spec.device),
            timeout_s=timeout_s,
            ranks_per_node=choice.ranks_per_node,
        )
        if groups.device.type == "cpu" and spec.parallel.shard != "none":
            give_back_large_blocks()  # only for runs that shard to save memory: fresh pages cost 15 % of a step
        self._joined = build_rank(spec, groups)

    def train(
        self, resume_from: Path | None = None, start: Mapping[str, Any] | None = None, again: bool = False
    ) -> TrainOutcome:
        """Train to the last step, or until a stop is requested on any rank, and save.

        Args:
            resume_from: a complete checkpoint; None starts from the initial weights.
            start: further fields of the event `started` or `resumed`, such as the rank map.
            again: the run goes on after a failure, without a user's choice. Then the intact checkpoint before it is
                loaded in place of a damaged one, and without a checkpoint the run starts over, with its records set
                aside.

        A rank that fails breaks its connections, so that the others need not wait for it until their time-out.
        """
        state = self._state
        with state.open_control() as control, state.groups.connections.aborted_on_error():
            run = TrainingRun(
                state,
                control,
                publish=self._lines.append,
                stop_requested=self._stop_requested,
                memory=self._memory,
                nodes=self._nodes,
            )
            if self._spec.faults:
                plan = FaultPlan(self._spec.faults, state.groups.rank, self._spec.run_dir)
                install(plan, run.trainer, state.control_tracker)
            begun = time.monotonic()
            done = self._load_run(run, resume_from, fall_back=again) if resume_from else 0
            load_s = time.monotonic() - begun
            has_records = (self._spec.run_dir / METRICS).exists()
            # Records up to step `kept` stay. A run that starts over at step 0 keeps none (-1), not even the evaluation
            # of step 0, which it makes again. None: there are no records yet.
            kept = done or (-1 if has_records and (again or resume_from is not None) else None)
            with self._open_log(kept) as log, self._open_scores(done) as scores:
                if log is not None:
                    # With the settings of the law, which a resumed run may have changed: `trimtab replay` needs them.
                    law = asdict(self._spec.balance)
                    log.event("started" if kept is None else "resumed", step=done, balance=law, **(start or {}))
                    if kept is not None:
                        self._lines.append({"event": "resumed", "step": done, "load_s": load_s})
                return run.run(done, log, scores)

    def _load_run(self, run: TrainingRun, path: Path, *, fall_back: bool) -> int:
        try:
            return run.load(path)
        except CheckpointCorrupt as error:  # raised on all ranks, with the same `previous`
            if error.previous is None or not fall_back:
                raise
            self._warn(str(error))
            return run.load(error.previous)

    def evaluate(self, checkpoint_path: Path, num_sequences: int | None) -> Evaluation:
        """Measure a checkpoint on the held-out text; None reads all of it."""
        return self._load_weights(checkpoint_path).evaluate(num_sequences)

    def generate(
        self, checkpoint_path: Path, prompts: list[str], sampling: SamplingConfig, on_token: OnToken | None = None
    ) -> Continuations:
        """Continue this rank's share of the prompts. on_token: called with each new token."""
        state, tokenizer = self._load_weights(checkpoint_path), load_tokenizer(self._spec.tokenizer)
        generated = generate(
            state.model,
            encode_prompts(tokenizer, prompts),
            sampling,
            state.groups,
            eod_id=tokenizer.eod_id,
            autocast=state.autocast(),
            on_token=on_token,
        )
        texts = {index: tokenizer.decode(tokens) for index, tokens in generated.new_ids.items()}
        return Continuations(texts, generated.speed)

    def held_checkpoints(self) -> list[HeldShare]:
        """Memory checkpoints that this process holds from its last gang. Quick; any thread; needs no gang."""
        return self._memory.held()

    def write_held(self, step: int) -> Path:
        """Write a memory checkpoint to the disk, so that the run can resume from it as from any other.

        Raises:
            CheckpointError: on all ranks, if a share is in no process, or the disk does not take it.

        Collective over a gang of any size, after `join`; processes that hold no share of it take part too.
        """
        return write_held(
            self._memory,
            step,
            self._spec.run_dir / CHECKPOINTS,
            self._state.groups.control_group,
            keep=self._spec.run.keep_checkpoints,
        )

    def progress(self, since: int) -> list[dict[str, Any]]:
        """Return metrics and events of this run from number `since` on; only rank 0 has any.

        Earlier ones are dropped, since the caller has them: a long run would not have memory for all of them.
        """
        num_known = max(0, since - self._num_dropped)
        del self._lines[:num_known]  # safe in this thread: the training thread only appends
        self._num_dropped += num_known
        return list(self._lines)

    def request_stop(self) -> None:
        """Ask all ranks to save and stop after the current step."""
        self._stop_requested.set()

    def abort(self) -> None:
        """Break the connections to all other ranks: calls that wait for one of them fail. From any thread."""
        if (state := self._joined) is not None:  # read once: the other thread may leave
            state.groups.connections.abort()

    def activity(self) -> dict[str, Activity]:
        """Activity of each thread, now or when the rank left its gang; empty before it joins. From any thread."""
        state = self._joined  # read once, as in `abort`
        return self._last_activity if state is None else state.activity()

    def leave(self) -> None:
        """Leave the process groups and free all that was built for them. Repeating it is harmless."""
        self._last_activity = self.activity()  # the driver asks a failed gang which rank waited for which
        self.abort()
        # Objects in reference cycles hold process groups, which close when the last reference is gone.
        self._joined = None
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _open_log(self, resume_step: int | None) -> AbstractContextManager[RunLog | None]:
        if self._state.groups.rank:
            return nullcontext()
        if self._spec.fence is not None:
            self._spec.fence.check()
        holes = []
        if resume_step is not None:
            holes = new_holes(self._spec.run_dir, find_holes(self._spec.run_dir, resume_step))
            set_aside_later(self._spec.run_dir / CHECKPOINTS, max(resume_step, 0))  # step 0 may be an imported model
            set_aside_later_scores(self._spec.run_dir, resume_step)
        log = RunLog(
            self._spec.run_dir,
            self._state.layout,
            resume_step,
            on_warning=self._warn,
            has_statistic=self._state.law.statistic is not None,
            has_samples=bool(self._spec.run.sample_prompts),
            fence=self._spec.fence,
        )
        for hole in holes:  # the driver has asked the user before, or the run goes on by itself after a failure
            log.event("record_hole", **hole.event())
        return log

    def _open_scores(self, done: int) -> AbstractContextManager[ScoreLog | None]:
        spec, groups = self._spec, self._state.groups
        if not spec.record_scores_every:
            return nullcontext()
        dist.barrier(groups.control_group)  # until rank 0 has renamed the folders that this start supersedes
        shape = ScoreShape(
            names=self._state.layout.names,
            num_experts=self._state.layout.num_experts,
            world_size=groups.world_size,
            num_micro_batches=spec.run.num_micro_batches(groups.num_shares),
        )
        # The driver reads the warnings of rank 0 only; those of other ranks go to the log of their process.
        warn = self._warn if groups.rank == 0 else _logger.warning
        log = ScoreLog(spec.run_dir, done + 1, groups.rank, shape, every=spec.record_scores_every, on_warning=warn)
        log.attach(self._state.routers)
        return log

    def _warn(self, text: str) -> None:
        self._lines.append({"event": "warning", "text": text})

    def _load_weights(self, path: Path) -> RankState:
        state = self._state
        state.load_weights(path)
        return state
