"""The files of results that commands write: JSON, and for a measurement its picture beside it."""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from workers.record.atomic_file import write_atomically
from workers.record.run_log import plain_values


def write_json(path: Path, values: Any, *, indent: int | None = None) -> None:
    """Write values as JSON, with null for numbers that are not finite; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plain_values(values), indent=indent, allow_nan=False) + "\n")


def write_measurement(folder: Path, values: Any, write_chart: Callable[[Path], None]) -> None:
    """Write values as JSON and a picture beside it, both named by the time, and print where they are."""
    record = new_name(folder, datetime.now())
    picture = record.with_suffix(".png")
    write_json(record, values)
    write_chart(picture)
    sys.stdout.write(f"\n{record}\n{picture}\n")


def new_name(folder: Path, now: datetime) -> Path:
    """A name that nothing has yet: the time, with a number where two measurements end in one second."""
    stem, number = now.strftime("%Y%m%d-%H%M%S"), 1
    while (path := folder / f"{stem}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return path
