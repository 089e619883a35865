"""An event file for TensorBoard, without torch or TensorFlow."""

import time
from collections.abc import Mapping
from typing import Any

from runtime.loggers.load_pictures import heat_map, histogram
from runtime.loggers.logger import LoggedRun
from runtime.watch.load_file import LoadFile
from workers.record.append_file import AppendFile
from workers.record.record_lines import Line

FOLDER = "tensorboard"


class TensorBoardFile:
    """Writes an event file in the run directory.

    Not with TensorBoard's own writer: its thread ends at the first write to a full disk, and what follows is lost.
    """

    id = None  # TensorBoard knows a run by its folder

    def __init__(self, run: LoggedRun) -> None:
        """Start a new file beside those of earlier processes."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.path / FOLDER
        folder.mkdir(exist_ok=True)
        # TensorBoard finds a file by "tfevents" and reads several in the order of their names.
        self._file = AppendFile(folder / f"events.out.tfevents.{time.time_ns() // 1000}.trimtab")
        self._records = RecordWriter(self._file)
        self._event, self._start = Event, SessionLog(status=SessionLog.START)
        self._last_step: int | None = None  # of the training lines in this file
        self._load = LoadFile(run.path)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, line: Line, values: Mapping[str, float]) -> None:
        self._begin_anew(line)
        event = self._event(wall_time=line["time"], step=line["step"])
        for tag, value in values.items():
            event.summary.value.add(tag=tag, simple_value=value)
        if line["kind"] == "eval":
            self._add_load(event)
        self._put(event)

    def close(self, state: str) -> None:
        self._file.close()
        if self._file.num_missing_bytes:
            raise OSError(f"{self._file.path}: the last {self._file.num_missing_bytes} bytes are lost")

    def _add_load(self, event: Any) -> None:
        """How the load of the last steps is spread in each layer, and a picture of all layers."""
        found, layout = self._load.last(until=event.step), self._load.layout
        if found is None or layout is None:
            return
        shares = found.shares(layout)
        for name, shares_E in zip(layout.names, shares, strict=True):
            event.summary.value.add(tag=f"load/{name}", histo=histogram(shares_E))
        width, height, png = heat_map(shares)
        picture = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": png}
        event.summary.value.add(tag="load/experts by layer", image=picture)

    def _begin_anew(self, line: Line) -> None:
        """If steps are trained again, write a START: TensorBoard hides what it has from that step on, in all files."""
        step, is_train = line["step"], line["kind"] == "train"
        if self._last_step is None or (is_train and step <= self._last_step):
            # The evaluation after a step has the number of that step, whose training line must not be hidden.
            first = step if is_train or step == 0 else step + 1
            self._put(self._event(wall_time=line["time"], step=first, session_log=self._start))
        if is_train or self._last_step is None:
            self._last_step = step

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
