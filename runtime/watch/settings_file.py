"""config.yaml of a run, as settings by dotted name. The file may hold anything: it may come from anybody."""

from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from runtime.settings.yaml_text import MAX_CHARACTERS, load_yaml
from runtime.watch.plain import plain
from runtime.watch.regular_file import read_at_most


class SettingsFile:
    """The recorded settings of a run. They change if the run resumes with others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text: bytes | None = None
        self.flat: dict[str, Any] = {}
        self.trouble = ""  # the error of a damaged file, whose settings are left out

    def poll(self) -> bool:
        """Read the file. Returns whether its content has changed."""
        text = read_at_most(self._path, 4 * MAX_CHARACTERS)
        if text is None or text == self._text:
            return False
        self._text = text
        try:
            values = load_yaml(text.decode())
            self.flat, self.trouble = dict(_flat(values)), ""
        except (InvalidValue, UnicodeDecodeError) as error:
            self.flat, self.trouble = {}, str(error)
        return True

    def positive_int(self, name: str) -> int | None:
        """A setting that is a whole number above 0; None for any other value."""
        value = self.flat.get(name)
        return value if type(value) is int and 0 < value < 2**53 else None


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, each in value.items() for pair in _flat(each, f"{name}.{key}" if name else str(key))]
    return [(name, plain(value))] if name else []
