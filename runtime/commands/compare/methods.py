"""Ways of balancing as a command line names them: a law, an auxiliary loss, or both."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dispatch.errors import InvalidValue
from runtime.commands.replay.specs import parse_law

# The name of a loss in a spec, and the value of aux.loss that it stands for.
LOSSES = {"aux": "switch", "global_batch": "global_batch", "sequence": "sequence"}
LOSS_KEYS = ("alpha", "z_alpha")


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    spec: as given. slug: the name of its folder. values: settings by dotted name.
    """

    spec: str
    slug: str
    values: Mapping[str, Any] = field(hash=False)


def parse_method(spec: str) -> Method:
    """A method by name: `newton`, `sign:u=0.003`, `aux:alpha=0.001`, or a law and a loss joined by +.

    A loss without a law leaves the bias at zero, a law without a loss has none.

    Raises:
        InvalidValue: names the spec and what is wrong with it.
    """
    values: dict[str, Any] = {"balance.law": "none", "aux.loss": "none"}
    kinds = []
    for part in spec.split("+"):
        name, _, rest = part.partition(":")
        kinds.append("loss" if name in LOSSES else "law")
        values |= _loss_values(part, name, rest) if name in LOSSES else _law_values(part)
    if len(set(kinds)) < len(kinds):
        raise InvalidValue(
            f"--laws {spec}: give at most one law and one loss, as in sign:u=0.001+sequence:alpha=0.0001"
        )
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", spec).strip("-.")
    return Method(spec, slug, values)


def parse_methods(specs: Iterable[str]) -> tuple[Method, ...]:
    """All methods of a comparison. Raises InvalidValue where two would have the same folder."""
    methods: dict[str, Method] = {}
    for method in map(parse_method, specs):
        if method.slug in methods:
            raise InvalidValue(f"--laws names {method.spec} and {methods[method.slug].spec}; give each method once")
        methods[method.slug] = method
    return tuple(methods.values())


def with_values(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A configuration with other values, by dotted name. Each section is built once: its rules see all new values.

    Raises:
        ValueError: there is no such setting. InvalidValue: a rule is broken.
    """
    known = {entry.name for entry in fields(config)}
    sections: dict[str, dict[str, Any]] = {}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name, dot, rest = key.partition(".")
        if name not in known:
            raise ValueError(f"there is no setting {prefix}{key}")
        if dot:
            sections.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    changes |= {name: with_values(getattr(config, name), inner, f"{prefix}{name}.") for name, inner in sections.items()}
    return replace(config, **changes)


def _law_values(part: str) -> dict[str, Any]:
    balance = parse_law(part, "--laws")
    return {f"balance.{entry.name}": getattr(balance, entry.name) for entry in fields(balance)}


def _loss_values(part: str, name: str, rest: str) -> dict[str, Any]:
    values: dict[str, Any] = {"aux.loss": LOSSES[name]}
    for setting in rest.split(","):
        key, equals, value = setting.partition("=")
        if not equals or key not in LOSS_KEYS:
            raise InvalidValue(
                f"--laws {part}: {setting!r:.60} must be {' or '.join(LOSS_KEYS)} and a number, as alpha=0.001"
            )
        try:
            values[f"aux.{key}"] = float(value)
        except ValueError:
            raise InvalidValue(f"--laws {part}: {key} is {value!r:.60}; it must be a number") from None
    if "aux.alpha" not in values:
        raise InvalidValue(f"--laws {part}: say how strong the loss is, as in {name}:alpha=0.001")
    return values
