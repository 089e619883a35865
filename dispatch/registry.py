"""Parts that a setting chooses by name: laws, exchanges, optimizers. Imports no torch, so that help can list them."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from dispatch.errors import InvalidValue

EntryT = TypeVar("EntryT")


class Registry(Mapping[str, EntryT]):
    """What each name stands for.

    Args:
        setting: whose values the names are, such as "balance.law". The setting `module` of the same section names a
            Python module of the user's own that registers further ones.
        ours: the module that registers each name that comes with Trimtab; imported when the entry is first needed.
        besides: values of the setting that stand for no entry, such as "auto".
    """

    def __init__(self, setting: str, ours: Mapping[str, str] | None = None, besides: tuple[str, ...] = ()) -> None:
        self.setting, self.module_setting = setting, f"{setting.partition('.')[0]}.module"
        self.ours, self.besides = dict(ours or {}), besides
        self._entries: dict[str, EntryT] = {}
        self._makers: dict[str, str] = {}

    @property
    def choices(self) -> list[str]:
        """All values of the setting."""
        return [*self.besides, *self]

    def register(self, name: str, entry: EntryT, made_by: Callable[..., Any]) -> None:
        """Add an entry. made_by: what is registered; the same again, of a module imported anew, replaces the entry.

        Raises:
            InvalidValue: something else has this name.
        """
        maker = f"{made_by.__module__}.{made_by.__qualname__}"
        known = self._makers.setdefault(name, maker)
        if known != maker or name in self.besides:
            raise InvalidValue(f"{self.setting} {name!r} is registered already, by {known}; choose another name")
        self._entries[name] = entry

    def forget(self, name: str) -> None:
        """Take a registered entry out."""
        del self._entries[name], self._makers[name]

    def check(self, value: str, module: str | None) -> None:
        """Import the user's module, where the settings name one, and refuse a value that stands for nothing.

        Raises:
            InvalidValue: the module cannot be imported, or neither it nor Trimtab knows the value.
        """
        if module:
            import_module(self.module_setting, module)
        if value not in self.choices:
            raise InvalidValue(
                f"{self.setting} is {value!r}; it must be one of {', '.join(self.choices)}, or come with "
                f"{self.module_setting}"
            )

    def find(self, name: str, module: str | None) -> EntryT:
        """The entry of a checked name. Imports the module where this process got the settings by pickle, unchecked."""
        if name not in self and module:
            import_module(self.module_setting, module)
        return self[name]

    def __getitem__(self, name: str) -> EntryT:
        if name not in self._entries and name in self.ours:
            importlib.import_module(self.ours[name])
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.ours, **self._entries})

    def __len__(self) -> int:
        return len({**self.ours, **self._entries})

    def __hash__(self) -> int:  # a type annotated with it must be hashable: Annotated[str, LAWS]
        return id(self)


def import_module(setting: str, name: str) -> None:
    """Import the Python module that a setting names. Raises InvalidValue, saying what is missing."""
    try:
        importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise InvalidValue(
            f"{setting} {name!r} cannot be imported: {error}; install it, or put its folder on PYTHONPATH"
        ) from error


def options_of(function: Callable[..., Any]) -> dict[str, float]:
    """The keyword-only arguments of a registered function with their defaults: constants that settings may change."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: float(each.default) for each in parameters if each.kind is each.KEYWORD_ONLY}


def checked_options(
    setting: str, owner: str, given: Mapping[str, float], known: Mapping[str, float]
) -> dict[str, float]:
    """Options as floats, in the order of their names: equal settings then have equal bytes on the wire.

    owner: whose options they are, as "law 'sign'". known: what it has, with the defaults.

    Raises:
        InvalidValue: one is not known, or not a finite number.
    """
    if not isinstance(given, Mapping):
        raise InvalidValue(f"{setting} is {given!r}; it must hold names and numbers, as {{beta: 0.9}}")
    for name, value in given.items():
        if name not in known:
            listing = f"knows {', '.join(sorted(known))}" if known else "has no options"
            raise InvalidValue(f"{setting} has {name!r}, but {owner} {listing}")
        if not is_number(value):
            raise InvalidValue(f"{setting}.{name} ({value!r}) must be a finite number; default {known[name]}")
    return {name: float(given[name]) for name in sorted(given)}


def is_number(value: object) -> bool:
    """Whether it is an int or a float, finite, and no bool."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type] # the first half says so
