"""Shell completion of `trimtab`: argcomplete (extra `completion`) offers the words of our parsers."""

import argparse
import os
from collections.abc import Callable, Iterable

from runtime.commands.command import CommandParser, Group, group_parser, parser_of
from runtime.runs.run_dir import folder_of_runs, runs_in

FIRST_WORD = "_ARGCOMPLETE"  # variable that argcomplete's shell function sets: which word names the program, from 1
RUNS = ("run", "runs", "resume", "init")  # arguments that name a run


def answer(commands: Group) -> None:
    """Write what fits the word under the cursor, and end the process. commands: all that `trimtab` has."""
    from argcomplete import autocomplete
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    entry: Group | str = commands
    first = int(os.environ[FIRST_WORD])
    while isinstance(entry, Group) and first < len(words) and words[first] in entry.commands:
        entry, first = entry.commands[words[first]], first + 1
    os.environ[FIRST_WORD] = str(first)  # the last word that was read here stands for the program
    autocomplete(_parser(entry), always_complete_options="long")


def _parser(entry: Group | str) -> argparse.ArgumentParser:
    if isinstance(entry, Group):
        parser: argparse.ArgumentParser = group_parser(entry, "trimtab")
        names = [name for name in entry.commands if name != entry.otherwise]
        _offer(parser, lambda action: names if action.dest == entry.word.lower() else ())
        return parser
    parser = _with_settings(parser_of(entry, "trimtab"))
    runs = [path.name for path in runs_in(folder_of_runs(None))]
    _offer(parser, lambda action: runs if action.dest in RUNS else _choices(action.metavar))
    return parser


def _with_settings(parser: CommandParser) -> argparse.ArgumentParser:
    if not parser.takes_settings:
        return parser
    from runtime.settings.config_file import all_options

    return argparse.ArgumentParser(parents=[all_options(), parser], add_help=False, conflict_handler="resolve")


def _choices(metavar: object) -> Iterable[str]:
    """The words of {one,another}, which the help shows for what has a few values."""
    shown = str(metavar)
    return shown[1:-1].split(",") if shown.startswith("{") and ":" not in shown else ()


def _offer(parser: argparse.ArgumentParser, words_of: Callable[[argparse.Action], Iterable[str]]) -> None:
    for action in parser._actions:  # noqa: SLF001 argcomplete reads an attribute that argparse knows nothing of
        if words := tuple(words_of(action)):
            action.completer = lambda words=words, **_: words  # type: ignore[attr-defined]
