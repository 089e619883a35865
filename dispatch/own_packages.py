"""Checks that no other module hides one of Trimtab's four packages, whose names are common words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dispatch.errors import InvalidValue

PACKAGES = ("dispatch", "workers", "cluster", "runtime")
ROOT = Path(__file__).resolve().parents[1]


def hiding_module(folder: Path) -> Path | None:
    """The module in `folder`, if any, that Python would import instead of one of ours if it looked there first."""
    if folder.resolve() == ROOT:
        return None
    candidates = [folder / part for name in PACKAGES for part in (f"{name}.py", f"{name}/__init__.py")]
    return next((path for path in candidates if path.is_file()), None)


def check_not_hidden() -> None:
    """Raise InvalidValue if Python would import another module by the name of one of ours. Imports none of them."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
        if found is not None and found.parents[1] != ROOT:
            raise InvalidValue(
                f"{found} hides Trimtab's own package of that name, {ROOT / name}: rename it, or "
                "take its folder off Python's path (PYTHONPATH, or the folder of the script that is run)"
            )
