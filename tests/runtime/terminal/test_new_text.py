"""What a terminal shows of a text while it comes."""

import io

from rich.console import Console

from runtime.terminal.new_text import NewText
from workers.data.tokenizer import ByteTokenizer


def test_a_text_appears_token_by_token_and_characters_whole() -> None:
    out, seen = io.StringIO(), []
    with NewText(ByteTokenizer(), ["a prompt: "], out, Console(stderr=True)) as new:
        for byte in "né😀!".encode():
            new.add(0, byte)
            seen.append(out.getvalue().removeprefix("a prompt: "))
        new.finish()
    # The bytes of a character appear with its last one.
    assert seen == ["n", "n", "né", "né", "né", "né", "né😀", "né😀!"]
    assert out.getvalue() == "a prompt: né😀!\n"


def test_a_text_that_ends_within_a_character_is_shown_to_its_end() -> None:
    out = io.StringIO()
    with NewText(ByteTokenizer(), ["x"], out, Console(stderr=True)) as new:
        for byte in b"y\xf0\x9f":
            new.add(0, byte)
        new.finish()
    assert out.getvalue() == "xy\ufffd\n" and new.texts() == {0: "y\ufffd"}
