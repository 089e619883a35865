"""The YAML reader of all configuration files: plain values, each name once, in bounded time.

A `config.yaml` may come with a run from anybody. Aliases can make ten lines hold 10^9 values, tags ask for Python
objects, and of a name that occurs twice PyYAML would silently take the last value. All of these are refused.
"""

from pathlib import Path
from typing import Any, Never

import yaml

from dispatch.errors import InvalidValue

# A configuration with all settings has 6 KiB. PyYAML reads this much in about a second.
MAX_CHARACTERS = 2**16
MAX_DEPTH = 32
# No setting has more. The time to read YAML's sexagesimal integers (1:30:00) grows with the square of their length.
MAX_DIGITS = 100


def load_yaml(text: str) -> Any:
    """The value of one YAML document: mappings with texts as keys, lists, texts, numbers, dates, true, false, null.

    Raises:
        InvalidValue: not valid YAML, a name twice in one mapping, an alias, a tag, or too much; names the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidValue(f"it is longer than {MAX_CHARACTERS} characters, which no configuration needs")
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 - it is a SafeLoader
    except InvalidValue:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 40th of May
        raise InvalidValue(f"not valid YAML: {' '.join(str(error).split())}") from error


def read_bounded(path: Path) -> str:
    """Read the text of a file for `load_yaml`: at most one character more than it accepts, so that it refuses those."""
    with path.open(encoding="utf-8") as file:
        return file.read(MAX_CHARACTERS + 1)


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"*{event.anchor:.60} refers to another part of the file (an alias); write its value again")
        if (tag := getattr(event, "tag", None)) is not None:
            _refuse(event, f"the tag {tag:.60} asks for a type; leave it out, plain values are enough")
        if self._depth == MAX_DEPTH:
            _refuse(event, f"more than {MAX_DEPTH} values are nested in each other")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            _refuse(node, f"{node.value:.20}... has {len(node.value)} digits, and at most {MAX_DIGITS} are read")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                _refuse(key, f"{key.value!r:.60} is not a name; put it in quotes if it is meant as text")
            line = key.start_mark.line + 1
            if key.value in lines:
                _refuse(key, f"{key.value:.60} stands here and in line {lines[key.value]}; leave one out")
            lines[key.value] = line
        return node


def _refuse(place: Any, problem: str) -> Never:
    """Refuse a node or an event of PyYAML, at the line where it begins."""
    raise InvalidValue(f"line {place.start_mark.line + 1}: {problem}")
