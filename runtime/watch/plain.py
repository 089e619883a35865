"""Makes values from a run's files, which may come from anybody, fit for an answer in JSON."""

import math
from typing import Any

MAX_DEPTH = 8  # a rank map has three


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """The value as JSON can hold it: numbers that are not finite become None, and what is nested too deeply '…'."""
    if isinstance(value, dict | list) and not depth:
        return "…"
    if isinstance(value, dict):
        return {str(name): plain(each, depth - 1) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each, depth - 1) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
