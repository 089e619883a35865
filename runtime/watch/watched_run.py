"""A run as the page sees it. One thread keeps it up to date by `poll`; requests read it on other threads."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.runs.run_dir import CONFIG_FILE, DATA_FILE, NOW_FILE
from runtime.runs.run_lock import LEASE_S, PREFIX
from runtime.watch.curves import PHASES, REST, is_number, pace_s, rest_s, slim
from runtime.watch.event_log import EventLog
from runtime.watch.json_file import JsonFile
from runtime.watch.load_file import LoadFile
from runtime.watch.metrics import Metrics
from runtime.watch.sample_file import SampleFile
from runtime.watch.settings_file import SettingsFile
from runtime.watch.tail import Rewritten
from workers.record.record_lines import Line
from workers.record.run_log import EVENTS, METRICS
from workers.record.sample_log import SAMPLES

UNDER_WAY = ("running", "recovering")
GONE = "gone"  # the run says that it is under way, and no process holds its directory any more


class _Files:
    """The files of a run, as far as they were read."""

    def __init__(self, path: Path) -> None:
        self.metrics, self.events = Metrics(path / METRICS), EventLog(path / EVENTS)
        self.settings, self.load = SettingsFile(path / CONFIG_FILE), LoadFile(path)
        self.now, self.data = JsonFile(path / NOW_FILE), JsonFile(path / DATA_FILE)
        self.samples = SampleFile(path / SAMPLES)

    def poll(self) -> bool:
        files = (self.metrics, self.events, self.settings, self.now, self.data, self.samples)
        return sum(file.poll() for file in files) > 0  # not any(), which would stop at the first file with news


class WatchedRun:
    """One run, whose directory need not exist yet.

    Attributes:
        stamp: grows whenever there is something new. A page that has seen this stamp is up to date.
        epoch: grows when steps in the past have changed, as when the run resumes from an earlier step.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.absolute().name
        self.stamp = self.epoch = 0
        self._files, self._told_state = _Files(path), ""

    @property
    def metrics(self) -> Metrics:
        """The curves."""
        return self._files.metrics

    @property
    def events(self) -> EventLog:
        """What has happened."""
        return self._files.events

    @property
    def load(self) -> LoadFile:
        """The load of every expert."""
        return self._files.load

    @property
    def samples(self) -> SampleFile:
        """Texts that it continued."""
        return self._files.samples

    @property
    def now(self) -> Any:
        """The content of now.json, the activity of each rank; None if the run is not under way."""
        return self._files.now.latest if self.state() in UNDER_WAY else None

    @property
    def is_behind(self) -> bool:
        """Whether there is more to be read."""
        return self.metrics.share_read < 1 or not (self.events.is_at_end and self.samples.is_at_end)

    def poll(self) -> bool:
        """Read on. Returns whether there was something new."""
        try:
            is_new = self._files.poll()
        except Rewritten:
            # New objects read the files. Requests see the old objects until these have read something.
            files = _Files(self.path)
            with contextlib.suppress(Rewritten):
                files.poll()
            self._files, self.epoch, is_new = files, self.epoch + 1, True
        if is_new or self.state() != self._told_state:
            self._told_state = self.state()
            self.stamp += 1
        return is_new

    def glance(self) -> dict[str, Any]:
        """The summary after all events and the last metrics were read, for a command that reads the run only once."""
        self.poll()
        while not self.events.is_at_end:
            self.poll()
        return self.summary()

    def state(self) -> str:
        """In one word: starting, running, recovering, finished, interrupted, failed, gone, or `not begun`."""
        state, sign = self.events.state, _last_sign(self.path)
        if state == "not begun":
            return state if sign is None else "starting"
        is_alive = sign is not None and time.time() - sign < LEASE_S
        return GONE if state in UNDER_WAY and not is_alive else state

    def summary(self) -> dict[str, Any]:
        """The numbers of the head of the page. They are sent at every change, so curves are not among them."""
        recent = list(self.metrics.recent)
        state, total = self.state(), self._files.settings.positive_int("run.steps")
        pace = pace_s(recent)
        left = max(total - self.metrics.last_step, 0) if total else None
        return {
            "name": self.name,
            "state": state,
            "epoch": self.epoch,
            "step": self.metrics.last_step,
            "total_steps": total,
            "left_s": pace * left if state in UNDER_WAY and pace is not None and left is not None else None,
            "pace_s": pace,
            "last_time": max(float(self.metrics.latest.get("time", 0.0)), self.events.last_time) or None,
            "latest": slim(self.metrics.latest),
            "mean": _means(recent),
            "first_eval": self.metrics.first_eval,
            "last_eval": self.metrics.last_eval,
            "share_read": self.metrics.share_read,
            "num_events": self.events.num,
            "num_recoveries": self.events.num_recoveries,
            "num_failures": self.events.num_failures,
            "num_samples": self.samples.num,
        }

    def facts(self) -> dict[str, Any]:
        """What does not change from step to step: settings, layers, ranks."""
        layout, start = self.load.layout, self.events.start
        return {
            "name": self.name,
            "curves": self.metrics.names,
            "own_metrics": self.metrics.own_metrics,
            "settings": self._files.settings.flat,
            "settings_trouble": self._files.settings.trouble,
            "layers": list(layout.names) if layout else [],
            "num_experts": list(layout.num_experts) if layout else [],
            "data": self._files.data.latest,
            "ranks": start.get("rank_map"),
            "exchange": start.get("exchange"),
            "balance": start.get("balance"),
        }


def _last_sign(run_dir: Path) -> float | None:
    """Unix time at which the owner of the directory last renewed its lock; None if there is no lock.

    It only looks at modification times: `run_lock.owner_of` opens lock files, which may come from anybody.
    """
    times = []
    for path in run_dir.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # released meanwhile
            times.append(path.stat().st_mtime)
    return max(times, default=None)


def _means(recent: Sequence[Line]) -> dict[str, float]:
    """Means over the recent steps: of the parts of a step's time, and of numbers that vary much from step to step."""
    names = (*PHASES, "step_s", "tokens_per_s", "mfu", "max_vio_batch", "max_vio_floor", "loss")
    values = {name: [line[name] for line in recent if is_number(line.get(name))] for name in names}
    values[REST] = [rest for line in recent if is_number(rest := rest_s(line))]
    return {name: sum(each) / len(each) for name, each in values.items() if each}
