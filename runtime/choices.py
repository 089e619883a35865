"""The parser of a word that says what to do: for `trimtab COMMAND` and for `trimtab bench TARGET`. Imports no torch."""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence

Choices = Mapping[str, Callable[[Sequence[str]], int]]


def choice_parser(program: str, word: str, choices: Choices, description: str) -> argparse.ArgumentParser:
    """A parser of the first argument, whose help lists the choices by the docstrings of their functions.

    word: what the help calls the argument, in capitals; in small letters it is the field of the result.
    """
    width = max(map(len, choices)) + 2
    listing = "\n".join(f"  {name:{width}}{run.__doc__}" for name, run in choices.items())
    what = word.lower()
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} {word} [options]",
        description=description,
        epilog=f"{what}s:\n{listing}\n\n`{program} {word} --help` explains its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Optional for argparse alone, which would else complain of a missing word where an option is unknown.
    parser.add_argument(what, type=_one_of(what, choices), nargs="?", metavar=word, help="see below")
    return parser


def chosen(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """The first argument, which must be one of the choices; the choices are listed where there is none.

    Raises:
        SystemExit: there is none, or another; or --help was asked for and answered.
    """
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    (word,) = vars(parser.parse_args(arguments[:1])).values()
    return str(word)


def _one_of(what: str, choices: Choices) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text in choices:
            return text
        near = difflib.get_close_matches(text, choices, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}; {way_out}")

    return read
