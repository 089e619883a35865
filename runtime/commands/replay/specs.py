"""Laws as a command line names them: `sign:u=0.003`, `newton`, `smebu:rate=0.01,beta=0.9`."""

from dataclasses import fields

from dispatch.errors import InvalidValue
from dispatch.laws import BalanceConfig

# u is what arXiv 2408.15664 calls the rate.
SHORT_KEYS = {"u": "rate"}


def parse_law(spec: str, option: str = "--law") -> BalanceConfig:
    """A law with settings: NAME or NAME:KEY=VALUE,..., where a key is a setting of `balance` or an option of the law.

    option: of the command line that has the spec, for the error.

    Raises:
        InvalidValue: names the option, the spec and what is wrong with it.
    """
    name, _, rest = spec.partition(":")
    settings: dict[str, object] = {}
    options: dict[str, float] = {}
    known = {each.name for each in fields(BalanceConfig)} - {"law", "options"}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InvalidValue(f"{option} {spec}: {part!r:.60} must be KEY=VALUE, as in sign:u=0.003")
        key = SHORT_KEYS.get(key, key)
        if key in ("schedule", "module"):
            settings[key] = value
        elif key in known:
            settings[key] = _number(f"{option} {spec}", key, value)
        else:
            options[key] = float(_number(f"{option} {spec}", key, value))
    try:
        return BalanceConfig(law=name, options=options, **settings)  # type: ignore[arg-type] # it checks them itself
    except InvalidValue as error:
        raise InvalidValue(f"{option} {spec}: {error}") from error


def _number(where: str, key: str, value: str) -> float | int:
    try:
        return int(value) if key == "horizon" else float(value)
    except ValueError:
        raise InvalidValue(f"{where}: {key} is {value!r:.60}; it must be a number") from None
