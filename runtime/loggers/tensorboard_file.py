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
    """One event file in the run directory. TensorBoard's own writer has a thread that a full disk ends."""

    id = None  # its files are found by their place

    def __init__(self, run: LoggedRun) -> None:
        """Start a new file beside those that earlier processes wrote."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.path / FOLDER
        folder.mkdir(exist_ok=True)
        # TensorBoard finds a file by "tfevents" and reads several in the order of their names.
        self._file = AppendFile(folder / f"events.out.tfevents.{time.time_ns() // 1000}.trimtab")
        self._records = RecordWriter(self._file)
        self._event, self._start = Event, SessionLog(status=SessionLog.START)
        self._trained: int | None = None  # the last step of training that this file has
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
        counts = [found.counts_N[where] for where in layout.slices]
        shares = [counts_E / max(float(counts_E.mean()), 1e-9) for counts_E in counts]
        for name, shares_E in zip(layout.names, shares, strict=True):
            event.summary.value.add(tag=f"load/{name}", histo=histogram(shares_E))
        width, height, png = heat_map(shares)
        picture = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": png}
        event.summary.value.add(tag="load/experts by layer", image=picture)

    def _begin_anew(self, line: Line) -> None:
        """Where steps are made anew, TensorBoard is told to hide what it has from there on, also in older files."""
        step, is_train = line["step"], line["kind"] == "train"
        if self._trained is None or (is_train and step <= self._trained):
            first = step if is_train or step == 0 else step + 1  # an evaluation follows its step, which stays
            self._put(self._event(wall_time=line["time"], step=first, session_log=self._start))
        if is_train or self._trained is None:
            self._trained = step

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
