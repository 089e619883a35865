"""The parser of a command's first word."""

from collections.abc import Sequence

import pytest

from runtime.choices import choice_parser, chosen


def _go(arguments: Sequence[str]) -> int:
    """Go there."""
    return len(arguments)


def _return(arguments: Sequence[str]) -> int:
    """Come back."""
    return 0


def test_the_help_lists_the_choices_in_one_column_and_an_unknown_one_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = choice_parser("walk", "PLACE", {"home": _return, "elsewhere": _go}, "Walk.")
    assert parser.parse_args(["home"]).place == "home"
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: walk PLACE [options]\n")
    assert "places:\n  home       Come back.\n  elsewhere  Go there.\n" in text
    assert "`walk PLACE --help` explains its options." in text
    for arguments, message in (
        (["xyz"], "'xyz' is no place; choose from home, elsewhere"),
        (["hmoe"], "'hmoe' is no place; did you mean home?"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        ([], text),
    ):
        with pytest.raises(SystemExit) as stop:
            chosen(parser, arguments)
        assert (stop.value.code, message in capsys.readouterr().err) == (2, True), arguments
