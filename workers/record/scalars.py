"""Scalars for TensorBoard, without torch or TensorFlow."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.record.append_file import AppendFile


class ScalarFile:
    """One event file for TensorBoard. Imports tensorboard when it is made, which takes most of a second.

    TensorBoard's own writer has a thread that a full disk ends; this one writes in the caller's.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Start a new file; TensorBoard then hides values of older files from `first_step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds a file by "tfevents" and reads several in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 1000}.trimtab"
        self.file = AppendFile(folder / name)
        self._records = RecordWriter(self.file)
        self._event = Event
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._put(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, line: Mapping[str, Any], *, prefix: str, layer_names: Sequence[str]) -> None:
        """Write every number of a plain metrics line: as `prefix/field`, or `prefix/field/layer` for a list."""
        event = self._event(wall_time=line["time"], step=line["step"])
        for tag, value in _scalars(line, layer_names):
            event.summary.value.add(tag=f"{prefix}/{tag}", simple_value=value)
        self._put(event)

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def _scalars(line: Mapping[str, Any], layer_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for field, value in line.items():
        if field in ("step", "time"):
            continue
        for name, number in _named(value, layer_names):
            if isinstance(number, int | float):
                yield field + name, float(number)


def _named(value: Any, layer_names: Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"/{name}", each) for name, each in zip(layer_names, value, strict=False)]
    if isinstance(value, dict):
        return [(f"/{name}", each) for name, each in value.items()]
    return [("", value)]
