"""The piece of text that each token stands for."""

from collections.abc import Sequence

from workers.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to
_BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8: more tokens than that never become one character


def text_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with the last of them."""
    # The pieces of the tokens before `done` are known. Tokens are decoded together from `context` on, since the text of
    # a token may depend on the one before (a space, for example).
    pieces, context, done = [""] * len(ids), 0, 0
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[context:done]), tokenizer.decode(ids[context:end])
        is_complete = len(text) > len(before) and not text.endswith(UNFINISHED)
        if is_complete or end == len(ids) or end - done >= _BYTES_OF_A_CHARACTER:
            pieces[end - 1] = text[len(before) :]
            # Bytes that are no text become U+FFFD, and the tokens that follow are decoded without them.
            context, done = (done if is_complete else end), end
    return pieces
