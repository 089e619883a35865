"""Whether a run trains exactly what an undisturbed one trains, line by line of their metrics."""

from collections.abc import Iterable, Mapping
from typing import Any

Line = Mapping[str, Any]


def differences(lines: Iterable[Line], calm: Iterable[Line]) -> dict[int, str]:
    """The first field in which a line differs from the calm run's of the same step, by step.

    Fields of time are left out, all others are compared bit for bit: losses, norms, loads, bias, tokens.
    """
    expected = {line["step"]: line for line in calm}
    found = {}
    for line in lines:
        step = line["step"]
        if step not in expected:
            found[step] = "the calm run has no such step"
        elif name := _first_difference(line, expected[step]):
            found[step] = f"{name} is {line.get(name)}, in the calm run {expected[step].get(name)}"
    return found


def _first_difference(line: Line, calm: Line) -> str | None:
    names = [name for name in line.keys() | calm.keys() if name != "time" and not name.endswith("_s")]
    return next((name for name in sorted(names) if line.get(name) != calm.get(name)), None)
