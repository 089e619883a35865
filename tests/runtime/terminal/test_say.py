import io

from rich.console import Console

from runtime.terminal.say import say


def test_a_line_comes_as_it_is_however_long_and_whatever_is_in_it():
    line = "go on with: trimtab train --resume runs/[bold]run[/bold] [1] " + "x" * 200
    terminal = io.StringIO()
    say(Console(file=terminal, width=40, force_terminal=True, highlight=False), line)
    assert terminal.getvalue() == f"{line}\n"
