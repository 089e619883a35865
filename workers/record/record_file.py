"""Files of binary records with length and checksum, so that a record torn by a crash is noticed.

Format: docs/run-directory.md. Needs no torch.
"""

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from dispatch.errors import InvalidValue

HEADER = struct.Struct("<qIII")  # step, tag, bytes that follow, crc32 of them


class RecordPlace(NamedTuple):
    """Where a record is in its file. offset: of the content, after the header. tag: its meaning depends on the file."""

    step: int
    tag: int
    num_bytes: int
    crc: int
    offset: int

    @property
    def start(self) -> int:
        """Where the header of the record begins."""
        return self.offset - HEADER.size


def pack_record(step: int, tag: int, content: bytes) -> bytes:
    """The bytes of a record: header and content."""
    return HEADER.pack(step, tag, len(content), zlib.crc32(content)) + content


def list_records(path: Path) -> tuple[list[RecordPlace], int]:
    """The complete records in their order, and the offset at which the last one ends. Only headers are read."""
    places: list[RecordPlace] = []
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        while end + HEADER.size <= size:
            file.seek(end)
            step, tag, num_bytes, crc = HEADER.unpack(file.read(HEADER.size))
            place = RecordPlace(step, tag, num_bytes, crc, end + HEADER.size)
            if place.offset + place.num_bytes > size:
                break
            places.append(place)
            end = place.offset + place.num_bytes
    return places, end


def read_record(path: Path, place: RecordPlace) -> bytes:
    """The content of a record. Raises InvalidValue (a ValueError) if its checksum is wrong."""
    with path.open("rb") as file:
        file.seek(place.offset)
        content = file.read(place.num_bytes)
    if zlib.crc32(content) != place.crc:
        raise InvalidValue(f"{path} is damaged at byte {place.offset}, in the record of step {place.step}")
    return content
