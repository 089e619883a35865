"""Reads the file that wandb writes offline: records of wandb's own protobuf in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _PREFIX = 7, 2**15, struct.Struct("<IHB")  # checksum, length and kind before each part of a record
_WHOLE, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, record = path.read_bytes(), _HEADER, b""
    while at + _PREFIX.size <= len(raw):
        left = _BLOCK - at % _BLOCK
        if left < _PREFIX.size:  # a prefix never goes over the end of a block
            at += left
            continue
        _, length, kind = _PREFIX.unpack_from(raw, at)
        at += _PREFIX.size + length
        record += raw[at - length : at]
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(record)
            record = b""


def rows(path: Path) -> list[dict[str, Any]]:
    """What each `log` sent."""
    histories = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each.item} for each in histories
    ]
