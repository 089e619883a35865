"""Python modules that settings name: one that only a run directory names is not imported, as it may be anybody's."""

import importlib
import sys
from collections.abc import Sequence

from dispatch.errors import InvalidValue

OPTION = "--balance.module"


def import_named(arguments: Sequence[str]) -> list[str]:
    """Import what the user names by --balance.module on the command line; return the other arguments.

    Raises:
        InvalidValue: there is no such module, or no name behind the option.
    """
    others, rest = [], iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option != OPTION:
            others.append(argument)
            continue
        name = value if equals else next(rest, "")
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise InvalidValue(
                f"{OPTION} {name!r} cannot be imported: {error}; install it, or put its folder on PYTHONPATH"
            ) from error
    return others


def check_consent(module: object) -> None:
    """Raises InvalidValue for a module that a run names and the user, or this program, has not imported."""
    if isinstance(module, str) and module and module not in sys.modules:
        raise InvalidValue(
            f"this run has laws from the Python module {module!r} (balance.module), which would run code; if you know "
            f"that module and trust it, say so by adding {OPTION} {module} to the command"
        )
