"""Lets the reference see the sections of our docstrings, which stand close together."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Returns|Raises|Examples):\n)")


class Sections(griffe.Extension):
    """Puts the empty line before each section that griffe asks for."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
