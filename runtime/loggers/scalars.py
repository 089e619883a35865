"""The numbers of a line of metrics.jsonl, under the names that every logger gives them."""

from collections.abc import Sequence
from typing import Any

from workers.record.record_lines import Line


def scalars(line: Line, layer_names: Sequence[str]) -> dict[str, float]:
    """Every number of the line, and booleans as 0 and 1; texts and nulls are left out.

    A field is named `kind/field`, an item of a list `kind/field/layer`, and one of an object `kind/field/key`.
    """
    return {
        f"{line['kind']}/{field}{name}": float(number)
        for field, value in line.items()
        if field not in ("step", "time")
        for name, number in _named(value, layer_names)
        if isinstance(number, int | float)
    }


def _named(value: Any, layer_names: Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"/{name}", each) for name, each in zip(layer_names, value, strict=False)]
    if isinstance(value, dict):
        return [(f"/{name}", each) for name, each in value.items()]
    return [("", value)]
