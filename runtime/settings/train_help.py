"""The help of `trimtab train`: a page of the most used options, and the help of all settings or of one section."""

import argparse
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from dispatch.errors import InvalidValue
from dispatch.registry import Registry
from runtime.settings.config import FINE_TUNING_LR, TrainConfig, flatten

OPTIONS = ("-h", "--help", "--help-all")
_USAGE = "trimtab train [--config FILE] [--SECTION.SETTING VALUE ...] | {--resume,--init} RUN [--step N] [...]"
_SHORT_HELP = {
    "--config FILE": "preset or YAML file: {presets} (small)",
    "--resume RUN": "go on with a run: its name or directory",
    "--init RUN": "a new run with the weights of that one: fine-tuning",
    "--dry-run": "check all of it and say what would be trained; start and write nothing",
    "--watch": "serve the live page meanwhile, and print its address",
    "--name NAME": "name of the run, runs/NAME (the time)",
    "--steps N": "optimizer steps ({run.steps})",
    "--workers N": "expert workers ({cluster.num_workers})",
    "--device NAME": "auto, cpu or cuda ({cluster.device})",
    "--data.path PATH": "text file or folder; several as [a,b] (plays and Python)",
    "--data.format NAME": "text or chat ({data.format})",
    "--data.tokenizer FILE": "tokenizer.json (bytes)",
    "--run.global_batch_size N": "sequences of a step, over all workers ({run.global_batch_size})",
    "--run.dtype NAME": "float32 or bfloat16 ({run.dtype})",
    "--run.eval_every N": "steps between evaluations ({run.eval_every})",
    "--run.checkpoint_every N": "steps between checkpoints ({run.checkpoint_every})",
    "--model.hidden N": "width of a token ({model.hidden})",
    "--model.num_layers N": "layers ({model.num_layers})",
    "--model.max_seq_len N": "tokens of a sequence ({model.max_seq_len})",
    "--model.moe.num_experts N": "experts of a layer ({model.moe.num_experts})",
    "--model.moe.top_k N": "experts that each token chooses ({model.moe.top_k})",
    "--optim.lr X": "highest learning rate ({optim.lr})",
    "--balance.law NAME": "rule of the selection bias ({balance.law})",
}
_EXAMPLES = """\
examples:
  trimtab train --config tiny --name first
  trimtab train --data.path my-texts/ --steps 1000
  trimtab train --resume first --steps 800"""


def help_text(request: list[str], defaults: TrainConfig, presets: str) -> str:
    """The answer to --help or --help-all. request: the option and, where it was named, the section behind it.

    Raises:
        InvalidValue: there is no such section.
    """
    option, *named = request
    sections = list(get_type_hints(TrainConfig))
    if named and named[0] not in sections:
        raise InvalidValue(f"{option} {named[0]}: there is no such section; choose from {', '.join(sections)}")
    if option != "--help-all" and not named:
        return _short_help(defaults, presets, sections)
    return settings_parser(defaults, presets, named or sections).format_help()


def _short_help(defaults: TrainConfig, presets: str, sections: list[str]) -> str:
    values = {key: _shown(value) for key, value in flatten(defaults).items()}
    width = max(map(len, _SHORT_HELP)) + 2
    lines = [f"  {option:{width}}{_filled(words, values, presets)}" for option, words in _SHORT_HELP.items()]
    more = f"all settings: --help-all; those of a section: --help {' | '.join(sections)}"
    return "\n".join([f"usage: {_USAGE}", "Train a model, or go on with a run.", "", *lines, "", _EXAMPLES, more, ""])


def _filled(words: str, values: Mapping[str, str], presets: str) -> str:
    """Replace the {setting} of a text by its value. `str.format` would read the dots of its name as attributes."""
    before, brace, rest = words.partition("{")
    if not brace:
        return words
    key, _, after = rest.partition("}")
    return before + (presets if key == "presets" else values[key]) + after


def settings_parser(defaults: TrainConfig, presets: str, sections: list[str]) -> argparse.ArgumentParser:
    """A parser with all options of these sections, for help and completion. `config_file` reads the options."""
    parser = argparse.ArgumentParser(
        usage=_USAGE,
        add_help=False,
        conflict_handler="resolve",
        description="Train a model. Options override the file; in parentheses, what holds without them.",
        epilog="Short forms: --name for --run.name, --steps for --run.steps, --workers for --cluster.num_workers, "
        "--device for --cluster.device.",
    )
    source = parser.add_argument_group("Where the settings come from")
    source.add_argument("--config", metavar="FILE", help=f"YAML file or preset: {presets} (small)")
    source.add_argument("--resume", metavar="RUN", help="go on with this run: its directory, or its name in runs/")
    lr = f"{FINE_TUNING_LR:g}"
    words = f"begin a new run with the weights, the model and the settings of this one, but with optim.lr {lr}"
    source.add_argument("--init", metavar="RUN", help=words)
    source.add_argument("--step", metavar="N", help="with --resume or --init: checkpoint of step N (the newest)")
    source.add_argument("--dry-run", action="store_true", help="check everything; start and write nothing")
    source.add_argument("--watch", action="store_true", help="serve the live page while it trains; prints the URL")
    values, hints, titles = flatten(defaults), get_type_hints(TrainConfig), _words_of(TrainConfig)
    for section in sections:
        group = parser.add_argument_group(titles[section].rstrip("."))
        for key, (hint, words) in _settings(hints[section], f"{section}.").items():
            shown = f"{words.rstrip('.')} ({_shown(values[key])})".replace("%", "%%")
            group.add_argument(f"--{key}", metavar=_metavar(hint), help=shown)
    return parser


def _settings(section: Any, prefix: str) -> dict[str, tuple[Any, str]]:
    """Type and meaning of each setting below a section, by dotted name."""
    words, found = _words_of(section), dict[str, tuple[Any, str]]()
    for name, hint in get_type_hints(section, include_extras=True).items():
        key = prefix + name
        found |= _settings(hint, f"{key}.") if is_dataclass(hint) else {key: (hint, words[name])}
    return found


def _words_of(section: Any) -> dict[str, str]:
    """The docstring below each field, inherited fields included."""
    texts = (docstring_parser.parse_from_object(each).params for each in reversed(section.__mro__[:-1]))
    return {each.arg_name: each.description or "" for params in texts for each in params}


def _metavar(hint: Any) -> str:
    names = list(get_args(hint)) if get_origin(hint) is Literal else []
    if get_origin(hint) is Annotated:
        names = [name for each in hint.__metadata__ if isinstance(each, Registry) for name in each.choices]
    if names:
        return "{" + ",".join(map(str, names)) + "}"
    # `int | None` is shown as int.
    hint = next((each for each in get_args(hint) if get_origin(hint) is UnionType and each is not type(None)), hint)
    if get_origin(hint) is tuple:
        return "[A,B]"
    return {bool: "{true,false}", int: "N", float: "X", str: "TEXT"}.get(hint, "{NAME: X}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return "not set" if value is None else str(value)
