"""What the page needs beside Trimtab itself."""

import importlib.util

from dispatch.errors import UserError

NEEDED = ("starlette", "uvicorn")


def check_installed(asker: str) -> None:
    """Raise UserError where a package is missing. Imports none. asker: what the user called, for the message."""
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{asker} needs {' and '.join(lacking)}; install them with: pip install 'trimtab[watch]'")
