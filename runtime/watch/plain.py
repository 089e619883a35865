"""Values of a file of anybody's as an answer can carry them."""

import math
from typing import Any

MAX_DEPTH = 8  # a rank map has three


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """The same value in what JSON has: numbers that are not finite as None, and what is nested too deeply as '…'."""
    if isinstance(value, dict | list) and not depth:
        return "…"
    if isinstance(value, dict):
        return {str(name): plain(each, depth - 1) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each, depth - 1) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
