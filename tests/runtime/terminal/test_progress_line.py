import io
from types import SimpleNamespace

import pytest

from runtime.terminal import progress_line
from runtime.terminal.progress_line import ProgressLine

ERASE = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_text_takes_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    stream = Terminal()
    with ProgressLine(stream) as progress:
        progress.show("booting")
        progress.show_minor("longer than the terminal")
        progress.tell("done after 3 s")
    assert stream.getvalue() == f"{ERASE}booting{ERASE}longer than{ERASE}done after 3 s\n{ERASE}"


def test_an_error_leaves_a_clean_line_too() -> None:
    stream = Terminal()
    with pytest.raises(RuntimeError), ProgressLine(stream):
        raise RuntimeError
    assert stream.getvalue() == ERASE


def test_in_a_log_minor_texts_are_lines_at_most_every_30_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress_line, "time", SimpleNamespace(monotonic=lambda: now_s))
    stream = io.StringIO()
    with ProgressLine(stream) as progress:
        for at_s, number in ((0.0, 1), (29.0, 2), (31.0, 3), (32.0, 4), (62.0, 5)):
            now_s = at_s
            progress.show_minor(f"round {number}")
        progress.show("the next part")
    assert stream.getvalue() == "round 3\nround 5\nthe next part\n"


def test_without_a_stream_nothing_is_said() -> None:
    with ProgressLine(None) as progress:
        progress.show("a")
        progress.tell("b")
