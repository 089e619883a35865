"""What a subcommand is, how one is chosen, and how its options are read. Imports neither torch nor Ray.

A subcommand is a module with three names, those of `Command`. `runtime/cli.py` lists the modules; nothing else knows
them. What a subcommand needs beyond argparse is imported inside its `run`, so that help and mistakes are answered at
once.
"""

import argparse
import difflib
import importlib
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, cast


class Command(Protocol):
    """The three names that the module of a subcommand has. HELP: one sentence, shown in the list of subcommands."""

    HELP: str

    def add_arguments(self, parser: "CommandParser") -> None:
        """Declare the options, and what else the help of the subcommand says."""

    def run(self, options: argparse.Namespace) -> int:
        """Carry the subcommand out and return its exit code.

        Raises:
            UserError: something that the user can mend.
        """


class Group(NamedTuple):  # a dataclass would import `inspect`, which --help can do without
    """Subcommands among which one more word of the command line chooses, as the target of `trimtab bench TARGET`.

    word: what the help calls that word, in capitals. help: the line of the group in the list that it belongs to.
    description: first sentence of its own help. commands: the name of the module of each, or a group in its turn.
    otherwise: the name of the subcommand for command lines whose first word names none.
    """

    word: str
    help: str
    description: str
    commands: Mapping[str, "str | Group"]
    otherwise: str | None = None


class CommandParser(argparse.ArgumentParser):
    """The parser of a subcommand; `add_arguments` may change whatever argparse lets it."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation could capture a setting that is left for `trimtab train`, and change with each new option.
        super().__init__(allow_abbrev=False, **options)
        self._rest: tuple[str, str] | None = None

    def leave(self, name: str, rest: Literal["everything", "unknown options", "behind --"]) -> None:
        """Leave a part of the command line unread: `run` finds it as a list in `options.NAME`."""
        self._rest = name, rest

    @property
    def takes_settings(self) -> bool:
        """Whether the settings of `trimtab train` may stand among the options."""
        return self._rest is not None and self._rest[1] in ("everything", "unknown options")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, with the option that a mistyped one is like, and exit with 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown.partition(" ")[0].partition("=")[0], known, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options, and the whole as one text in `command_line`. Exits as argparse does on --help and mistakes."""
        name, rest = self._rest or ("", "")
        if rest == "everything":
            return argparse.Namespace(**{name: list(arguments)})
        given, left = list(arguments), list[str]()
        if rest == "behind --" and "--" in given:
            # argparse itself would take what is behind it for positional arguments.
            cut = given.index("--")
            given, left = given[:cut], given[cut + 1 :]
        if rest == "unknown options":
            options, left = self.parse_known_args(given)
        else:
            options = self.parse_args(given)
        if name:
            setattr(options, name, left)
        options.command_line = f"{self.prog} {shlex.join(arguments)}"
        return options


def run_command(entry: str | Group, program: str, arguments: Sequence[str]) -> int:
    """Run the subcommand of this module, or the one of this group that the first argument names."""
    if isinstance(entry, Group):
        name = choose(entry, program, arguments)
        rest = arguments if name == entry.otherwise else arguments[1:]
        return run_command(entry.commands[name], f"{program} {name}", rest)
    return _load(entry).run(read_options(entry, program, arguments))


def read_options(module: str, program: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the subcommand of this module, which its `run` takes. Exits on --help and mistakes."""
    return parser_of(module, program).read(arguments)


def parser_of(module: str, program: str) -> CommandParser:
    """The parser of the subcommand of this module."""
    command = _load(module)
    parser = CommandParser(prog=program, description=command.HELP)
    command.add_arguments(parser)
    return parser


def choose(group: Group, program: str, arguments: Sequence[str], *, version: str | None = None) -> str:
    """The name that the first argument chooses. version: what --version answers, if it does.

    Raises:
        SystemExit: there is no argument, or one that is wrong; or --help or --version was asked for and answered.
    """
    if arguments and arguments[0] in group.commands:
        return arguments[0]  # without the list, for which every module would be imported
    if group.otherwise is not None and arguments and not arguments[0].startswith("-"):
        return group.otherwise
    parser = group_parser(group, program)
    if version is not None:
        parser.add_argument("--version", action="version", version=version)
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    return str(vars(parser.parse_args(arguments[:1]))[group.word.lower()])


def group_parser(group: Group, program: str) -> argparse.ArgumentParser:
    """A parser of the first word, whose help lists the subcommands."""
    width = max(map(len, group.commands)) + 2
    helps = {name: each.help if isinstance(each, Group) else _load(each).HELP for name, each in group.commands.items()}
    listing = "\n".join(f"  {name:{width}}{text}" for name, text in helps.items())
    what = group.word.lower()
    parser = CommandParser(
        prog=program,
        usage=f"{program} {group.word} [options]",
        description=group.description,
        epilog=f"{what}s:\n{listing}\n\n`{program} {group.word} --help` explains its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Optional, else argparse reports the missing word where the real mistake is an unknown option.
    parser.add_argument(what, type=_one_of(what, group.commands), nargs="?", metavar=group.word, help="see below")
    return parser


def _load(module: str) -> Command:
    return cast(Command, importlib.import_module(module))


def _one_of(what: str, names: Collection[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no {what}; {way_out}")

    return read
