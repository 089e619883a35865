"""Reads settings from YAML files, presets and the options of `trimtab train`, and checks them by the dataclasses."""

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from runtime.runs.run_data import has_text_digest, with_run_copies
from runtime.runs.run_dir import CONFIG_FILE, RUNS_DIR, default_runs_dir, find_run
from runtime.settings import train_help
from runtime.settings.config import (
    FINE_TUNING_LR,
    TrainConfig,
    check_resume,
    check_same_model,
    cross_check,
    flatten,
    on_gpus,
)
from runtime.settings.consent import check_consent, import_named
from runtime.settings.yaml_text import load_yaml, read_bounded

BASE_PRESET = "small"
SHORT_OPTIONS = {
    "--name": "--run.name",
    "--steps": "--run.steps",
    "--workers": "--cluster.num_workers",
    "--device": "--cluster.device",
}
DRY_RUN, WATCH = "--dry-run", "--watch"
NO_SETTINGS = ("config", "resume", "init", "step", "help", "help-all")  # options that are no settings
MAX_NON_TEXT_CHARS = 40  # of a value for a setting that takes a number or a choice, see `_checked_text`
VALUES_IF_BARE = {"--balance.record": "1"}
FORMER_VALUES = {("model.recompute", True): "full", ("model.recompute", False): "none"}  # in config.yaml of older runs


@dataclass(frozen=True)
class TrainRequest:
    """What a command line of `trimtab train` asks for.

    resume: directory of the run to go on with; None starts a new one. init: directory of the run with whose weights a
    new one begins; None draws them. step: the checkpoint of `resume` or `init`; None takes the newest. dry_run: check
    everything, train nothing. watch: serve the live page meanwhile.
    """

    config: TrainConfig
    resume: Path | None
    step: int | None
    init: Path | None = None
    dry_run: bool = False
    watch: bool = False


def parse_train(arguments: Sequence[str], count_gpus: Callable[[ClusterConfig], int] | None = None) -> TrainRequest:
    """Read the command line of `trimtab train`. Options override the settings of a file or run; all rules are checked.

    count_gpus: counts the GPUs of a joined cluster; a preset takes a worker for each.

    Raises:
        InvalidValue: wrong usage or configuration, with the way out.
        SystemExit: --help was asked for and answered.
    """
    request = _parse_train([argument for argument in arguments if argument not in (DRY_RUN, WATCH)], count_gpus)
    return replace(request, dry_run=DRY_RUN in arguments, watch=WATCH in arguments)


def _parse_train(arguments: Sequence[str], count_gpus: Callable[[ClusterConfig], int] | None) -> TrainRequest:
    arguments = _with_values([_with_long_name(argument) for argument in arguments])
    import_named(arguments)
    try:
        source = vars(_source_parser().parse_known_args(arguments)[0])
    except argparse.ArgumentError as error:
        raise InvalidValue(f"{error}; see `trimtab train --help`") from error
    config_name, resume_name, init_name, step = (source.get(each) for each in ("config", "resume", "init", "step"))
    _answer_help(arguments, config_name, resume_name or init_name)
    if init_name is not None:
        if config_name is not None or resume_name is not None:
            other = "--config" if resume_name is None else "--resume"
            raise InvalidValue(f"--init takes the settings of its run, so {other} cannot be given too; leave one out")
        return _parse_init(arguments, init_name, step)
    if resume_name is None:
        if step is not None:
            raise InvalidValue(f"--step ({step}) chooses a checkpoint of --resume RUN or --init RUN, which is missing")
        base = load_config(config_name or BASE_PRESET)
        if base.run.dir == RUNS_DIR:
            base = replace(base, run=replace(base.run, dir=default_runs_dir()))
        config = _parse_options(arguments, base)
        if is_preset(config_name or BASE_PRESET):  # A preset fits any machine; a file may be written for this one.
            chosen = {each.removeprefix("--").split("=")[0] for each in arguments}
            config = on_gpus(config, chosen, count_gpus)
        cross_check(config)
        return TrainRequest(config, None, None)
    if config_name is not None:
        raise InvalidValue("--resume takes the settings of the run, so --config cannot be given with it; leave one out")
    run_dir = find_run(resume_name, _runs_dir_of(arguments))
    saved = read_run_config(run_dir)
    config = _parse_options(arguments, saved)
    check_resume(saved, config, text_may_move=has_text_digest(run_dir))
    cross_check(config)
    return TrainRequest(config, run_dir, step)


def _parse_init(arguments: Sequence[str], name: str, step: int | None) -> TrainRequest:
    """A new run with the weights and the model of another run; options override the other settings of that run."""
    other = find_run(name, _runs_dir_of(arguments))
    saved = read_run_config(other)
    if saved.model.lora.rank:
        raise InvalidValue(
            f"{other} has adapters (model.lora.rank {saved.model.lora.rank}), and a new run begins with whole weights: "
            f"merge them with `trimtab export {other} DIR --merged`, then `trimtab import DIR RUN`"
        )
    base = replace(saved, run=replace(saved.run, name=None), optim=replace(saved.optim, lr=FINE_TUNING_LR))
    config = _parse_options(arguments, base)
    check_same_model(config.model, saved.model, str(other))
    if config.balance.entry.multiplies != saved.balance.entry.multiplies:
        raise InvalidValue(
            f"balance.law {config.balance.law!r} cannot go on with the bias of {saved.balance.law!r} in {other}: "
            "one is added to scores, the other multiplies them; choose another law"
        )
    cross_check(config)
    return TrainRequest(config, None, step, other)


def override(config: TrainConfig, arguments: Sequence[str]) -> TrainConfig:
    """Override settings by options of a command line; rules between sections are not checked yet.

    Raises:
        InvalidValue: wrong usage or configuration, with the way out.
    """
    return _parse_options([_with_long_name(argument) for argument in arguments], config)


def load_config(name: str) -> TrainConfig:
    """Load a preset by name or a YAML file by path. What the file leaves out has the value of the preset `small`.

    Raises:
        InvalidValue: it is missing, unreadable or wrong; names the file.
    """
    base = _base_preset()
    return base if name == BASE_PRESET else config_from_yaml_file(_find_config(name), base, is_trusted=True)


@functools.cache
def _base_preset() -> TrainConfig:
    """The preset BASE_PRESET, which gives the values that a file leaves out. Cached, since reading it takes 0.2 s."""
    return config_from_yaml_file(_find_config(BASE_PRESET))


def is_preset(name: str) -> bool:
    """Whether a preset has this name."""
    return name in _find_presets()


def preset_like(name: str) -> str | None:
    """The preset whose name is most like a mistyped one; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, _find_presets(), n=1)), None)


def config_from_yaml_file(path: Path, base: TrainConfig | None = None, *, is_trusted: bool = False) -> TrainConfig:
    """Call `config_from_yaml` with the text of a file; errors name its path."""
    try:
        return config_from_yaml(read_bounded(path), base, is_trusted=is_trusted)
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{path} is not text (byte {error.start}); a configuration is a YAML file") from error
    except InvalidValue as error:
        raise InvalidValue(f"{path}: {error}") from error


def read_run_config(run_dir: Path) -> TrainConfig:
    """Read the settings of a run, with the paths of its own copies of tokenizer and template, in its present folder."""
    config = config_from_yaml_file(run_dir / CONFIG_FILE)
    return replace(config, data=with_run_copies(config.data, run_dir))


def config_from_yaml(text: str, base: TrainConfig | None = None, *, is_trusted: bool = False) -> TrainConfig:
    """Settings from YAML. What the text leaves out has the value in `base`, or the dataclass's default.

    is_trusted: the user gave the text, so that modules which it names are imported. Else `check_consent` guards that.

    Raises:
        InvalidValue: not YAML, an unknown setting, a value of the wrong type or out of range.
    """
    values = load_yaml(text)
    if not isinstance(values, Mapping):
        raise InvalidValue(f"must hold sections such as 'model:' with settings below them, not {values!r:.60}")
    flat = _flatten_known(values)
    if not is_trusted:
        check_consent(flat)
    # jsonargparse reads texts as YAML by default. Those of the file were read as YAML already.
    parser = _settings_parser(base or TrainConfig(), parser_mode="json")
    try:
        namespace = parser.parse_object(flat)
    except argparse.ArgumentError as error:
        raise InvalidValue(_explain(error)) from error
    except RecursionError:
        raise InvalidValue("a text in it looks like JSON that is nested too deep; give plain values") from None
    for key, value in flat.items():
        # YAML distinguishes the text "null" from null; the parser, made for command lines, does not.
        if isinstance(value, str) and namespace[key] is None:
            namespace[key] = value
    return _build(parser, namespace)


def all_options() -> argparse.ArgumentParser:
    """A parser with every option of `trimtab train`, for shell completion only; `parse_train` reads the options."""
    presets = ",".join(sorted(_find_presets()))
    parser = train_help.settings_parser(_base_preset(), presets, list(get_type_hints(TrainConfig)))
    parser.add_argument("--config", metavar=f"{{{presets}}}")
    for short in SHORT_OPTIONS:
        parser.add_argument(short)
    return parser


def config_to_yaml(config: TrainConfig) -> str:
    """Write all values as YAML, from which `config_from_yaml` makes an equal configuration."""
    return str(yaml.safe_dump(asdict(config), sort_keys=False))


def _answer_help(arguments: Sequence[str], config_name: str | None, resume_name: str | None) -> None:
    asked = next((index for index, argument in enumerate(arguments) if argument in train_help.OPTIONS), None)
    if asked is None:
        return
    named = [word for word in arguments[asked + 1 : asked + 2] if not word.startswith("-")]
    file = None if resume_name is None else find_run(resume_name, _runs_dir_of(arguments)) / CONFIG_FILE
    defaults = load_config(config_name or BASE_PRESET) if file is None else config_from_yaml_file(file)
    presets = ", ".join(sorted(_find_presets()))
    sys.stdout.write(train_help.help_text([arguments[asked], *named], defaults, presets))
    raise SystemExit(0)


def _with_long_name(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return SHORT_OPTIONS.get(option, option) + equals + value


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Give the options of VALUES_IF_BARE their default value if they have none: the parser demands one."""
    filled = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        bare = argument in VALUES_IF_BARE and following.startswith("--")
        filled.append(f"{argument}={VALUES_IF_BARE[argument]}" if bare else argument)
    return filled


def _source_parser() -> argparse.ArgumentParser:
    """Options that say where the settings come from; those not given are absent from the namespace."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("--init")
    parser.add_argument("--step", type=int)
    return parser


def _runs_dir_of(arguments: Sequence[str]) -> str | None:
    """The folder of runs that options name, in which --resume looks for its run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run.dir", dest="runs_dir", nargs="?")  # `_parse_options` refuses the option without a value
    runs_dir: str | None = parser.parse_known_args(arguments)[0].runs_dir
    return runs_dir


def _settings_parser(base: TrainConfig, **options: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    parser.add_class_arguments(TrainConfig)
    parser.set_defaults(flatten(base))
    return parser


def _parse_options(arguments: Sequence[str], base: TrainConfig) -> TrainConfig:
    parser = _settings_parser(base, prog="trimtab train", parents=[_source_parser()])
    try:
        return _build(parser, parser.parse_args(list(arguments)))
    except argparse.ArgumentError as error:
        raise InvalidValue(_explain(error)) from error


def _build(parser: ArgumentParser, namespace: Namespace) -> TrainConfig:
    for key, hint in _setting_types(TrainConfig).items():
        # The parser accepts null for a setting of any type.
        if namespace[key] is None and type(None) not in get_args(hint):
            raise InvalidValue(f"{key} is empty (null); give a value, or leave it out")
    built = parser.instantiate(namespace)
    return TrainConfig(**{section: built[section] for section in get_type_hints(TrainConfig)})


def _setting_types(section: Any, prefix: str = "") -> dict[str, Any]:
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        types |= _setting_types(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return types


def _flatten_known(values: Mapping[Any, Any], section: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Settings of a YAML document by dotted name. Raises InvalidValue for one that does not exist."""
    hints = get_type_hints(section)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InvalidValue(f"unknown setting {key:.60}{_suggest(key)}")
        if not is_dataclass(hints[name]):
            # Only booleans: 1 equals True as a key, and was never a value.
            known = FORMER_VALUES.get((key, value), value) if isinstance(value, bool) else value
            flat[key] = _checked_text(key, known, hints[name])
        elif isinstance(value, Mapping):
            flat |= _flatten_known(value, hints[name], f"{key}.")
        else:
            raise InvalidValue(f"{key} is a section: it must hold settings below it, not {value!r:.60}")
    return flat


def _checked_text(key: str, value: Any, hint: Any) -> Any:
    """The value. Raises InvalidValue for a long text, alone or in a list, where a number or a choice is expected.

    The parser would read such a text as YAML in spite of its mode. Aliases in it could make its error message huge.
    """
    if hint is not str and str not in get_args(hint):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > MAX_NON_TEXT_CHARS:
                raise InvalidValue(f"{key} is {text!r:.60}...; it must be {_describe(hint)}")
    return value


def _explain(error: argparse.ArgumentError) -> str:
    """Turn the message of jsonargparse into one of ours, with the value, the rule and a way out."""
    message = " ".join(str(error).split())
    if unknown := re.match(r"unrecognized arguments: --([\w.-]+)", message):
        return f"unknown option --{unknown[1]}{_suggest(unknown[1], '--')}"
    place = re.match(r'Parser key "([\w.]+)": ', message)
    if place is None:
        return f"{message}; see `trimtab train --help`"
    hint = _setting_types(TrainConfig).get(place[1])
    if hint is None:
        return f"--{place[1]} is a section: give its settings one by one, as in --{place[1]}.SETTING VALUE"
    given = re.split(r"(?:Got|Given) value: ", message)[-1]
    return f"{place[1]} is {given!r:.60}; it must be {_describe(hint)}"


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is UnionType:
        return " or ".join(_describe(each) for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is tuple:
        return {float: "a list of numbers, as [0.5,0.5]"}.get(get_args(hint)[0], "a list of texts, as [a,b]")
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "names and numbers, as {beta: 0.9}")


def _suggest(key: str, dashes: str = "") -> str:
    known = [*get_type_hints(TrainConfig), *_setting_types(TrainConfig)]
    if dashes:
        known += [*NO_SETTINGS, *(option.removeprefix(dashes) for option in (*SHORT_OPTIONS, DRY_RUN, WATCH))]
    known = [name for name in known if name != key]  # `key` may be an option of `train` that another command lacks
    near = difflib.get_close_matches(key, known, n=1) or [name for name in known if name.endswith(f".{key}")]
    return f"; did you mean {' or '.join(dashes + name for name in near)}?" if near else "; see `trimtab train --help`"


def _find_presets() -> dict[str, Path]:
    installed = Path(__file__).parents[1] / "configs"  # in a wheel; in the repository they are at its root
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "configs"
    return {path.stem: path for path in folder.glob("*.yaml")}


def _find_config(name: str) -> Path:
    presets = _find_presets()
    path = presets.get(name, Path(name).expanduser())
    if path.is_file():
        return path
    near = preset_like(name)
    hint = f"did you mean {near}?" if near else f"give a YAML file or a preset: {', '.join(sorted(presets))}"
    raise InvalidValue(f"--config {name}: there is no such file or preset; {hint}")
