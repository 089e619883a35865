"""Gives a logger the lines of metrics.jsonl, each once and in order, also if the run resumes or the logger fails."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.loggers.logger import LoggedRun, MetricsLogger
from runtime.loggers.scalars import scalars
from runtime.runs.run_dir import CONFIG_FILE
from runtime.watch.curves import parsed
from runtime.watch.load_file import LoadFile
from runtime.watch.settings_file import SettingsFile
from runtime.watch.tail import Rewritten, Tail
from workers.record.atomic_file import write_atomically
from workers.record.record_lines import Line
from workers.record.run_log import METRICS

FOLDER = "loggers"  # in the run directory: a file for each logger with its state `Sent`
POLL_S = 1.0
RETRY_S = 60.0  # after a failure: long enough for a server to restart


@dataclass(frozen=True)
class Sent:
    """The last line that a logger has taken (step, and Unix time), and its id of the run."""

    id: str | None = None
    step: int = -1
    time: float = 0.0

    def lacks(self, line: Line) -> bool:
        """Whether the logger has not had this line. The line of a step that is trained again has a later time."""
        return bool(line["step"] > self.step or line["time"] > self.time)

    def after(self, line: Line) -> "Sent":
        """The state once the logger has had a line. The time never goes back, even if the machine's clock does."""
        return Sent(self.id, line["step"], max(self.time, line["time"]))


class Feed:
    """The lines of one run for one logger. If the logger fails, it gets the missing lines when it works again."""

    def __init__(
        self, run_dir: Path, name: str, open_logger: Callable[[LoggedRun], MetricsLogger], environ: Mapping[str, str]
    ) -> None:
        self.name = name
        self._run_dir, self._open_logger, self._environ = run_dir, open_logger, environ
        self._state_file = run_dir / FOLDER / f"{name}.json"
        self._sent = _read_sent(self._state_file)
        self._load = LoadFile(run_dir)
        self._logger: MetricsLogger | None = None
        self._read_from_start()

    def poll(self) -> bool:
        """Send the next lines. Returns whether there were any. Raises what the logger raises; then call `drop`."""
        try:
            lines = self._tail.read()
        except Rewritten:  # the run resumed, and moved later lines aside
            self._read_from_start()
            return True
        if lines:
            self._send([text for _, text in lines])
        return bool(lines)

    def drop(self) -> None:
        """Close a logger that has failed. The next poll opens it again and goes on after the last line that it took."""
        logger, self._logger = self._logger, None
        self._read_from_start()
        if logger is not None:
            with contextlib.suppress(Exception):  # its first failure is the one that is reported
                logger.close("running")

    def close(self, state: str) -> None:
        """Close the logger for good. state: that of the run, see `MetricsLogger.close`."""
        if self._logger is not None:
            self._logger.close(state)
            self._logger = None

    def _read_from_start(self) -> None:
        # While it catches up, lines that the logger has had are left out.
        self._tail, self._is_catching_up = Tail(self._run_dir / METRICS), True

    def _send(self, texts: list[bytes]) -> None:
        before, layout = self._sent, self._load.layout
        try:
            for line in self._unsent(texts):
                self._opened().log(line, scalars(line, () if layout is None else layout.names))
                self._sent = self._sent.after(line)
        finally:
            if self._sent != before:
                self._save()

    def _unsent(self, texts: list[bytes]) -> Iterator[Line]:
        for text in texts:
            line = parsed(text)
            if line is None or (self._is_catching_up and not self._sent.lacks(line)):
                continue
            self._is_catching_up = False
            yield line

    def _opened(self) -> MetricsLogger:
        if self._logger is None:
            settings = SettingsFile(self._run_dir / CONFIG_FILE)
            settings.poll()
            name = self._run_dir.absolute().name
            run = LoggedRun(self._run_dir, name, settings.flat, self._environ, self._sent.id)
            self._logger = self._open_logger(run)
            self._sent = Sent(self._logger.id, self._sent.step, self._sent.time)
            self._save()  # Before the first line: a process that resumes after a kill must find the id of this run.
        return self._logger

    def _save(self) -> None:
        self._state_file.parent.mkdir(exist_ok=True)
        write_atomically(self._state_file, json.dumps(asdict(self._sent)) + "\n")


def follow(
    feed: Feed,
    ended: threading.Event,
    state_of_run: Callable[[], str],
    tell: Callable[[str], None],
    *,
    poll_s: float = POLL_S,
    retry_s: float = RETRY_S,
) -> None:
    """Feed a logger until `ended` is set and it has all lines. A failure is told once, and retried every `retry_s`.

    state_of_run: returns the state for `MetricsLogger.close`. tell: called with each message to the user.
    """
    has_failed = False
    while True:
        is_last = ended.is_set()  # Asked before the lines are read: if it is set, none is written after those.
        try:
            while feed.poll():
                pass
            if is_last:
                feed.close(state_of_run())
                return
            if has_failed:
                tell(f"{feed.name} takes the metrics again, and has got what it lacked")
            has_failed = False
        except Exception as error:  # noqa: BLE001 A logger's package may raise anything, and must not end the others.
            feed.drop()
            if is_last:
                tell(f"{feed.name} lacks the last metrics of the run ({_brief(error)}); metrics.jsonl has them all")
                return
            if not has_failed:
                tell(f"{feed.name} failed ({_brief(error)}); the run goes on, and it is tried again")
            has_failed = True
        ended.wait(retry_s if has_failed else poll_s)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:500]


def _read_sent(path: Path) -> Sent:
    try:
        stored = json.loads(path.read_text())
        return Sent(stored["id"] and str(stored["id"]), int(stored["step"]), float(stored["time"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Sent()
