"""The job of a training run, for the supervisor: where to go on from, what to show, and when it is over."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.failures.errors import GangFailed
from runtime.job.launch import LaunchedGang
from runtime.job.live import LiveView
from runtime.job.now_file import NowFile
from runtime.job.rank_map import exchange_of, rank_map, rank_table
from runtime.runs.event_text import event_line
from runtime.runs.run_lock import RunLock
from runtime.settings.cautions import TrainingWarnings
from runtime.settings.config import TrainConfig
from runtime.settings.size import model_size
from runtime.terminal.interrupt import StopSignal
from runtime.terminal.quantities import byte_size, duration
from workers.checkpoints.checkpoint_files import CHECKPOINTS, CheckpointError, latest, step_of
from workers.record.run_log import append_event
from workers.training.outcome import TrainOutcome

if TYPE_CHECKING:
    from cluster.gang.gang import Gang
    from cluster.gang.supervisor import Recovery


class TrainingJob:
    """Implements `cluster.gang.supervisor.Job`. Shows rank 0's progress, and tells rank 0 when the user asks to stop.

    resume_from: the checkpoint that the user resumes from; None starts at step 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        lock: RunLock,
        launched: LaunchedGang,
        resume_from: Path | None,
        *,
        view: LiveView,
        signal: StopSignal,
    ) -> None:
        self._config, self._run_dir, self._lock, self._launched = config, run_dir, lock, launched
        self._now = NowFile(run_dir)
        self._resume_from = resume_from and resume_from.absolute()
        self._view, self._signal = view, signal
        self._warnings = TrainingWarnings(config.balance.law if config.aux.loss == "none" else config.aux.loss)
        # Whether rank 0 has reported anything. Until then the checkpoints in the directory may be of later steps than
        # the one that the user chose to resume from.
        self._is_recording = False
        self._recovery: Recovery | None = None
        # Unix time when the gang was last told to train, and seconds that it then took to load the checkpoint.
        self._train_time = self._load_s = 0.0
        self._num_lines, self._told_to_stop = 0, False  # lines of progress that rank 0 of this gang has handed over
        self._saving: tuple[float, int] | None = None  # the checkpoint under way: see `_save_progress`

    def prepare_attempt(self, gang: "Gang", recovery: "Recovery | None") -> tuple[Any, ...]:
        ranks, exchange = rank_map(self._config, gang), exchange_of(self._config, gang)
        seconds = {"ray_s": self._launched.ray_s, "gang_s": gang.startup_s["total"]}
        start = {"rank_map": ranks, "exchange": asdict(exchange), **seconds}
        if recovery is not None:
            self._view.event(rank_table(ranks, exchange))
        self._recovery, self._train_time, self._load_s = recovery, time.time(), 0.0
        self._num_lines, self._told_to_stop = 0, False
        self._forward_stop_request(gang)  # If the user asked during the recovery, the gang makes one step and saves.
        newest = self._newest_checkpoint()
        if recovery is not None:
            newest = self._from_memory(gang, newest)
        return newest, start, recovery is not None

    def saved_step(self) -> int:
        newest = self._newest_checkpoint()
        return -1 if newest is None else step_of(newest)

    def on_poll(self, gang: "Gang") -> None:
        self._lock.check()
        self._forward_stop_request(gang)
        self._now.write(gang.seen())
        lines = gang.control(0, "progress", self._num_lines)
        self._num_lines += len(lines)
        for line in lines:
            self._is_recording = True
            self._note_recovery(line)
            self._show(line)
        if self._saving is not None:
            self._view.saving(self._save_progress(*self._saving))

    def is_over(self, results: list[TrainOutcome]) -> bool:
        return results[0].completed or self._signal.stop_requested

    def stop_requested(self) -> bool:
        return self._signal.stop_requested

    def tell(self, event: str, **details: Any) -> None:
        if self._lock.is_held():  # The directory may belong to another run by now; that may be the very event.
            append_event(self._run_dir, event, **details)
        self._view.event(event_line({"event": event, **details}))

    def _forward_stop_request(self, gang: "Gang") -> None:
        if self._signal.stop_requested and not self._told_to_stop:
            self._view.event("stopping: saving a checkpoint after this step; Ctrl-C again stops at once")
            gang.control(0, "request_stop")
            self._told_to_stop = True

    def _newest_checkpoint(self) -> Path | None:
        if not self._is_recording:
            return self._resume_from
        saved = latest(self._run_dir / CHECKPOINTS)
        return saved and saved.absolute()

    def _from_memory(self, gang: "Gang", newest: Path | None) -> Path | None:
        """The checkpoint to go on from. If the workers hold a later one in memory, it is written to the disk first."""
        from workers.checkpoints.memory_checkpoint import newest_recoverable

        step = newest_recoverable(gang.run("held_checkpoints", keep=True))
        if step is None or (newest is not None and step <= step_of(newest)):
            return newest
        try:
            path: Path = gang.run("write_held", step, keep=True)[0]
        except GangFailed as failed:
            if not isinstance(failed.first.error, CheckpointError):
                raise
            self.tell("memory_checkpoint_unusable", step=step, reason=str(failed.first.error))
            return newest
        self.tell("checkpoint", step=step, path=str(path), from_memory=True)
        return path.absolute()

    def _note_recovery(self, line: dict[str, Any]) -> None:
        """At the first step after a recovery, record how long the recovery took, and each part of it."""
        if line.get("event") == "resumed":
            self._load_s = line["load_s"]
            self._view.resumed(line["step"])
        if self._recovery is None or line.get("kind") != "train":
            return
        recovery, self._recovery = self._recovery, None
        seconds = {name: value for name, value in recovery.seconds.items() if name != "total"}
        seconds |= {"load": self._load_s, "first step": line["time"] - self._train_time - self._load_s}
        total_s = line["time"] - recovery.since
        self.tell("recovered", step=line["step"], total_s=total_s, seconds=seconds)

    def _show(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self._saving = None
            self._view.event(event_line(line))
        elif line["kind"] == "saving":
            self._saving = time.monotonic(), model_size(self._config.model, self._config.optim).checkpoint_bytes
        elif line["kind"] == "eval":
            self._view.eval(line)
        else:
            self._view.update(line)
            for text in self._warnings.notice(line):
                self.tell("warning", text=text)

    def _save_progress(self, since: float, total_bytes: int) -> str:
        """The progress of the checkpoint under way, by the size of its files, which are written to a *.partial folder.

        since: its start (monotonic). total_bytes: an estimate.
        """
        written = 0
        with contextlib.suppress(OSError):  # The folder was renamed meanwhile: the checkpoint is complete.
            files = (self._run_dir / CHECKPOINTS).glob(".step_*.partial/*")
            written = sum(file.stat().st_size for file in files)
        elapsed = duration(time.monotonic() - since)
        return f"saving: {byte_size(written)} of about {byte_size(total_bytes)} written, {elapsed}"
