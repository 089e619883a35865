"""Checks that the packages of the live page, an optional extra, are installed."""

import importlib.util

from dispatch.errors import UserError

NEEDED = ("starlette", "uvicorn")


def check_installed(asker: str) -> None:
    """Raise UserError if a package is missing. Imports none. asker: the command or option that needs them."""
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{asker} needs {' and '.join(lacking)}; install them with: pip install 'trimtab[watch]'")
