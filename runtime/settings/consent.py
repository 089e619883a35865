"""The import of Python modules that settings name. Importing runs code, and a run directory may come from anybody.

So a module is imported only if the user names it on the command line, and never because a run names it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dispatch.errors import InvalidValue

MODULE_SETTINGS = ("balance.module", "optim.module", "parallel.module")


def import_named(arguments: Sequence[str]) -> None:
    """Import the modules that the user names on a command line of settings, as by --balance.module.

    Raises:
        InvalidValue: there is no such module, or the option has no value.
    """
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option.removeprefix("--") in MODULE_SETTINGS:
            _import(option, value if equals else next(rest, ""))


def add_consent(parser: argparse.ArgumentParser) -> None:
    """Add options by which the user of a command that reads runs names modules to import. They are not in its help."""
    for setting in MODULE_SETTINGS:
        parser.add_argument(f"--{setting}", action=_ImportNamed, nargs="?", const="", help=argparse.SUPPRESS)


def check_consent(settings: Mapping[str, Any]) -> None:
    """Refuse a run that names a module which has not been imported.

    Args:
        settings: settings of the run, by dotted name.
    Raises:
        InvalidValue: names the module, and the option by which the user can trust it.
    """
    for setting in MODULE_SETTINGS:
        module = settings.get(setting)
        if isinstance(module, str) and module and module not in sys.modules:
            raise InvalidValue(
                f"this run uses the Python module {module!r} ({setting}), which would run code; if you know that "
                f"module and trust it, say so by adding --{setting} {module} to the command"
            )


class _ImportNamed(argparse.Action):
    def __call__(self, _parser: Any, _namespace: Any, value: Any, option: str | None = None) -> None:
        _import(option or "", value)


def _import(option: str, name: str) -> None:
    from dispatch.registry import import_module  # it imports `inspect`, which --help can do without

    import_module(option, name)
