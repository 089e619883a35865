"""Windows of whole documents: written out, and against any documents that hypothesis makes up."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.data.shards import FIRST, TARGET
from workers.data.windows import NO_TARGET, DocumentWindows, TextWindows

_ = NO_TARGET


def _stream(*documents: tuple[list[int], list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flags from (tokens, 0 or 1 for each that is learned) of each document."""
    tokens = np.concatenate([ids for ids, _ in documents]).astype(np.uint16)
    flags = np.concatenate([learned for _, learned in documents]).astype(np.uint8) * TARGET
    firsts = np.cumsum([0, *(len(ids) for ids, _ in documents)])[:-1]
    flags[firsts] |= FIRST
    return tokens, flags


def test_windows_of_text_share_a_token_and_no_target() -> None:
    windows = TextWindows(np.arange(10, 20, dtype=np.uint16), 4)
    assert len(windows) == 2
    assert windows.read(1).tolist() == [[14, 15, 16, 17], [15, 16, 17, 18], [0, 0, 0, 0]]
    assert windows.num_targets(1) == 4


def test_whole_documents_fill_a_window_and_what_follows_is_read_without_targets() -> None:
    # Windows of 6: documents of 3 and 2 tokens, then the next would be cut; it begins the second window instead.
    windows = DocumentWindows(
        *_stream(([11, 12, 13], [0, 1, 1]), ([21, 22], [1, 1]), ([31, 32, 33, 34], [0, 0, 1, 1])), seq_len=6
    )
    assert len(windows) == 2
    assert windows.read(0).tolist() == [
        [11, 12, 13, 21, 22, 31],
        [12, 13, _, 22, _, _],  # 21 and 31 begin documents: nobody predicts them; 32 counts in the second window
        [0, 0, 0, 3, 3, 5],
    ]
    assert windows.read(1).tolist() == [
        [31, 32, 33, 34, 11, 12],  # at the end of the stream its beginning follows
        [_, 33, 34, _, _, _],  # 32 is of the question
        [0, 0, 0, 0, 4, 4],
    ]
    assert [windows.num_targets(index) for index in range(2)] == [3, 2]


def test_a_document_longer_than_a_window_is_cut_and_loses_no_target() -> None:
    windows = DocumentWindows(*_stream(([1, 2, 3, 4, 5, 6, 7], [1] * 7), ([8, 9], [1, 1])), seq_len=3)
    assert [windows.read(index)[1].tolist() for index in range(len(windows))] == [
        [2, 3, 4],
        [5, 6, 7],
        [_, 9, _],  # 7 and both of 8 and 9 fit
    ]


@given(
    documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=12),
    seq_len=st.integers(1, 8),
)
def test_every_learned_token_but_a_first_one_is_the_target_of_one_place(documents, seq_len) -> None:
    counter = iter(range(1, 1000))
    tokens, flags = _stream(*(([next(counter) for _ in learned], learned) for learned in documents))
    windows = DocumentWindows(tokens, flags, seq_len)
    seen, first_of = (
        [],
        dict(zip(tokens.tolist(), np.maximum.accumulate(np.where(flags & FIRST, tokens, 0)), strict=True)),
    )
    for index in range(len(windows)):
        ids, targets, starts = windows.read(index)
        counted = targets != NO_TARGET
        assert counted.sum() == windows.num_targets(index)
        assert (targets[counted] == ids[counted] + 1).all()
        assert all(first_of[target] == first_of[ids[place]] for place, target in enumerate(targets) if counted[place])
        # A place sees its own document from its first token, or from where the window begins in it.
        assert all(first_of[ids[start]] == first_of[ids[place]] for place, start in enumerate(starts))
        assert all(
            starts[place] in (0, *np.flatnonzero(np.isin(ids, list(first_of.values())))) for place in range(seq_len)
        )
        seen += targets[counted].tolist()
    learned = flags & TARGET > 0
    assert sorted(seen) == tokens[learned & (flags & FIRST == 0)].tolist()
