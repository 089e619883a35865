"""Parts that a setting chooses by name: laws, exchanges, optimizers. Imports no torch, so that help can list them."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from dispatch.errors import InvalidValue

EntryT = TypeVar("EntryT")


class Registry(Mapping[str, EntryT]):
    """The entries that the values of a setting name.

    Args:
        setting: the setting, such as "balance.law". The setting `module` of the same section names a Python module of
            the user's own that registers further entries.
        builtin: for each name that comes with Trimtab the module that registers it; imported when first needed.
        other_choices: values of the setting that name no entry, such as "auto".
    """

    def __init__(
        self, setting: str, builtin: Mapping[str, str] | None = None, other_choices: tuple[str, ...] = ()
    ) -> None:
        self.setting, self.module_setting = setting, f"{setting.partition('.')[0]}.module"
        self.builtin, self.other_choices = dict(builtin or {}), other_choices
        self._entries: dict[str, EntryT] = {}
        self._makers: dict[str, str] = {}  # by name of the entry: the qualified name of what was registered

    @property
    def choices(self) -> list[str]:
        """All values of the setting."""
        return [*self.other_choices, *self]

    def register(self, name: str, entry: EntryT, made_by: Callable[..., Any]) -> None:
        """Add an entry. made_by: the decorated function or class; if its module is imported again, it replaces itself.

        Raises:
            InvalidValue: another function or class has this name, or it is one of `other_choices`.
        """
        maker = f"{made_by.__module__}.{made_by.__qualname__}"
        if name in self.other_choices:
            raise InvalidValue(f"{self.setting} {name!r} has a meaning of its own; choose another name")
        known = self._makers.setdefault(name, maker)
        if known != maker:
            raise InvalidValue(f"{self.setting} {name!r} is registered already, by {known}; choose another name")
        self._entries[name] = entry

    def forget(self, name: str) -> None:
        """Remove a registered entry."""
        del self._entries[name], self._makers[name]

    def check(self, value: str, module: str | None) -> None:
        """Import the user's module, where the settings name one, and check that the value is a choice.

        Raises:
            InvalidValue: the module cannot be imported, or neither it nor Trimtab registers the value.
        """
        if module:
            import_module(self.module_setting, module)
        if value not in self.choices:
            raise InvalidValue(
                f"{self.setting} is {value!r:.60}; it must be one of {', '.join(self.choices)}, or come with "
                f"{self.module_setting}"
            )

    def find(self, name: str, module: str | None) -> EntryT:
        """The entry of a name that `check` accepted. Imports the user's module where only another process has yet."""
        if name not in self and module:
            import_module(self.module_setting, module)
        return self[name]

    def __getitem__(self, name: str) -> EntryT:
        if name not in self._entries and name in self.builtin:
            importlib.import_module(self.builtin[name])
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.builtin, **self._entries})

    def __len__(self) -> int:
        return len({**self.builtin, **self._entries})

    def __hash__(self) -> int:  # Mapping has none, but Annotated[str, LAWS] must be hashable
        return id(self)


def import_module(setting: str, name: str) -> None:
    """Import the Python module that a setting names. Raises InvalidValue with the reason if that fails."""
    try:
        importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise InvalidValue(
            f"{setting} {name!r:.60} cannot be imported: {error}; install it, or put its folder on PYTHONPATH"
        ) from error


def options_of(function: Callable[..., Any]) -> dict[str, float]:
    """The keyword-only arguments of a registered function with their defaults: constants that settings may change."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: float(each.default) for each in parameters if each.kind is each.KEYWORD_ONLY}


def checked_options(
    setting: str, owner: str, given: Mapping[str, float], known: Mapping[str, float]
) -> dict[str, float]:
    """Options as floats, sorted by name, so that equal settings are sent as equal bytes.

    owner: what has the options, such as "law 'sign'". known: its options, with their defaults.

    Raises:
        InvalidValue: an option is not known, or not a finite number.
    """
    if not isinstance(given, Mapping):
        raise InvalidValue(f"{setting} is {given!r:.60}; it must hold names and numbers, as {{beta: 0.9}}")
    for name, value in given.items():
        if name not in known:
            listing = f"knows {', '.join(sorted(known))}" if known else "has no options"
            raise InvalidValue(f"{setting} has {name!r:.60}, but {owner} {listing}")
        if not is_number(value):
            raise InvalidValue(f"{setting}.{name} ({value!r:.60}) must be a finite number; default {known[name]}")
    return {name: float(given[name]) for name in sorted(given)}


def is_number(value: object) -> bool:
    """Whether the value is an int or float, and no bool, that is finite as a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type] # a number here
