import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.data.tokenizer import ByteTokenizer
from workers.generation.pieces import text_pieces

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize(
    ("ids", "pieces"),
    [
        ([], []),
        (list(b"ab"), ["a", "b"]),
        ([256, *b"a"], ["", "a"]),  # the end of a document stands for no text
        (list("aé".encode()), ["a", "", "é"]),
        (list("\N{GRINNING FACE}!".encode()), ["", "", "", "\N{GRINNING FACE}", "!"]),
        ([0xC3], ["\ufffd"]),  # it ends within a character
        ([0x80, *b"ab"], ["", "\ufffda", "b"]),
        ([0x80] * 5 + [*b"a"], ["", "", "", "\ufffd" * 4, "", "\ufffda"]),
    ],
)
def test_a_character_comes_with_its_last_token_and_what_is_none_is_told(ids: list[int], pieces: list[str]) -> None:
    assert text_pieces(TOKENIZER, ids) == pieces


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_pieces_of_a_text_are_that_text(text: str) -> None:
    ids = TOKENIZER.encode(text).tolist()
    assert "".join(text_pieces(TOKENIZER, ids)) == text
