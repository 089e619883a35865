"""The parser of a word that says what to do: for `trimtab COMMAND` and for `trimtab bench TARGET`. Imports no torch."""

import argparse
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
        epilog=f"{what}s:\n{listing}\n\n`{program} {word} --help` explains the options of a {what}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(what, choices=choices, metavar=word, help="see below")
    return parser
