"""What each token of a text stands for."""

from collections.abc import Sequence

from workers.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to
_BYTES_OF_A_CHARACTER = 4  # of UTF-8: whoever waits for more tokens than that waits for none


def text_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with the last of them."""
    pieces, known, shown = [""] * len(ids), 0, 0  # tokens before `shown` are told; from `known` on they decode together
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[known:shown]), tokenizer.decode(ids[known:end])
        is_whole = len(text) > len(before) and not text.endswith(UNFINISHED)
        if is_whole or end == len(ids) or end - shown >= _BYTES_OF_A_CHARACTER:
            pieces[end - 1] = text[len(before) :]
            # What is no text at all is told as it is, and what follows begins anew.
            known, shown = (shown if is_whole else end), end
    return pieces
