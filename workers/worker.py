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
from workers.checkpoints.memory_checkpoint import HeldShard, MemoryCheckpoints, write_held
from workers.data.tokenizer import load_tokenizer
from workers.distributed.exchange_choice import choose_exchange
from workers.distributed.heap import give_back_large_blocks
from workers.distributed.parallel import join_groups, local_device
from workers.generation.decoding import OnToken
from workers.generation.generate import SamplingConfig, Speed, encode_prompts, generate
from workers.record.record_check import find_holes, new_holes
from workers.record.run_log import METRICS, RunLog
from workers.record.score_log import ScoreLog, ScoreShape, set_aside_later_scores
from workers.training.evaluation import Evaluation, evaluate
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
        self._num_taken = 0  # lines that were told and are no longer kept
        self._last_words: dict[str, Activity] = {}
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

        After `leave` a rank can join again, with another rank and world size: nothing of the time before remains.

        nodes: the index of each rank's machine, by rank; empty where it is not known.
        """
        gc.collect()  # the model of the time before: it, its optimizer and its trainer refer to each other
        self._lines.clear()
        self._num_taken = 0
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
            give_back_large_blocks()  # who shards is short of memory; it costs fresh pages
        self._joined = build_rank(spec, groups)

    def train(
        self, resume_from: Path | None = None, start: Mapping[str, Any] | None = None, again: bool = False
    ) -> TrainOutcome:
        """Train to the last step, or until a stop is requested on any rank, and save.

        Args:
            resume_from: a complete checkpoint; None starts from the initial weights.
            start: what the record says of this start: the rank map and whatever else the launcher knows.
            again: go on with a run that failed. A damaged checkpoint then gives way to the intact one before it, and
                without any the run starts over, with what it had recorded set aside.

        A rank that fails breaks its connections: the others need not wait for it until their time-out.
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
            # At step 0, also with the weights of another run, the first evaluation is made anew: nothing is kept.
            kept = done or (-1 if has_records and (again or resume_from is not None) else None)
            with self._open_log(kept) as log, self._open_scores(done) as scores:
                if log is not None:
                    # With the law as it is now: resuming may change its rate, and a replay needs to know.
                    law = asdict(self._spec.balance)
                    log.event("started" if kept is None else "resumed", step=done, balance=law, **(start or {}))
                    if kept is not None:
                        self._lines.append({"event": "resumed", "step": done, "load_s": load_s})
                return run.run(done, log, scores)

    def _load_run(self, run: TrainingRun, path: Path, *, fall_back: bool) -> int:
        try:
            return run.load(path)
        except CheckpointCorrupt as error:  # the same on all ranks, as is the way out
            if error.previous is None or not fall_back:
                raise
            self._warn(str(error))
            return run.load(error.previous)

    def evaluate(self, checkpoint_path: Path, num_sequences: int | None) -> Evaluation:
        """Measure a checkpoint on the held-out text; None reads all of it."""
        state = self._load(checkpoint_path)
        run, num_shares = self._spec.run, state.groups.num_shares
        return evaluate(
            state.model,
            state.dataset,
            state.sampler,
            state.groups,
            batch_size=max(1, run.global_batch_size // num_shares // run.num_micro_batches(num_shares)),
            num_sequences=num_sequences,
            autocast=state.autocast(),
            routers=state.routers,
            pipeline=state.pipeline,
        )

    def generate(
        self, checkpoint_path: Path, prompts: list[str], sampling: SamplingConfig, on_token: OnToken | None = None
    ) -> Continuations:
        """Continue this rank's share of the prompts; `on_token` is told of each new token."""
        state, tokenizer = self._load(checkpoint_path), load_tokenizer(self._spec.tokenizer)
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

    def held_checkpoints(self) -> list[HeldShard]:
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

        Earlier ones are dropped, or a long run would keep them all: the caller has them already.
        """
        num_known = max(0, since - self._num_taken)
        del self._lines[:num_known]  # the training thread only appends
        self._num_taken += num_known
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
        return self._last_words if state is None else state.activity()

    def leave(self) -> None:
        """Leave the process groups and free all that was built for them. Repeating it is harmless."""
        self._last_words = self.activity()  # the driver still asks a failed gang which rank waited for which
        self.abort()
        # Cycles of objects that hold a group keep it.
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
            set_aside_later(self._spec.run_dir / CHECKPOINTS, max(resume_step, 0))  # 0: what the run begins with
            set_aside_later_scores(self._spec.run_dir, resume_step)
        log = RunLog.create(
            self._spec.run_dir,
            self._state.layout,
            resume_step,
            on_warning=self._warn,
            has_statistic=self._state.law.statistic is not None,
            has_samples=bool(self._spec.run.sample_prompts),
            fence=self._spec.fence,
        )
        for hole in holes:  # the user accepted it, or the run itself goes on after a failure
            log.event("record_hole", **hole.event())
        return log

    def _open_scores(self, done: int) -> AbstractContextManager[ScoreLog | None]:
        spec, groups = self._spec, self._state.groups
        if not spec.record_scores_every:
            return nullcontext()
        dist.barrier(groups.control_group)  # rank 0 has renamed the folders that this start supersedes
        shape = ScoreShape(
            names=self._state.layout.names,
            num_experts=self._state.layout.num_experts,
            world_size=groups.world_size,
            num_micro_batches=spec.run.num_micro_batches(groups.num_shares),
        )
        # Only rank 0 is listened to; the others have the log of their process.
        warn = self._warn if groups.rank == 0 else _logger.warning
        log = ScoreLog(spec.run_dir, done + 1, groups.rank, shape, every=spec.record_scores_every, on_warning=warn)
        log.attach(self._state.routers)
        return log

    def _warn(self, text: str) -> None:
        self._lines.append({"event": "warning", "text": text})

    def _load(self, path: Path) -> RankState:
        state = self._state
        state.load_weights(path)
        return state
