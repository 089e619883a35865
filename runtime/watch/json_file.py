"""A small JSON file that a run replaces as a whole: now.json, data.json."""

import json
from pathlib import Path
from typing import Any

from runtime.watch.plain import plain
from runtime.watch.regular_file import read_at_most

MAX_BYTES = 2**22  # some ten thousand ranks


class JsonFile:
    """The file as it is now. `poll` reads it; `latest` may be asked on any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text: bytes | None = None
        self.latest: Any = None

    def poll(self) -> bool:
        """Read the file. Returns whether its content has changed."""
        text = read_at_most(self._path, MAX_BYTES)
        if text is None or text == self._text:
            return False
        self._text = text
        try:
            self.latest = plain(json.loads(text))
        except (ValueError, RecursionError):
            self.latest = None
        return True
