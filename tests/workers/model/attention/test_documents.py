"""Attention over packed documents and windows against the mask of a whole row, and what it holds at most."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workers.model.attention.slow_masks import (
    expect_equal,
    learn,
    mask_of_documents,
    starts_of,
    under_window,
    whole_masks,
)
from tests.workers.model.test_decoder import VARIANT, build, tokens
from workers.distributed.context import Context
from workers.model.attention import Documents, LatentConfig
from workers.model.attention.attend import attend, attend_by_varlen, varlen_kernel
from workers.model.attention.documents import QueryBlock
from workers.model.model_config import Recompute

HEADS, KV_HEADS = 4, 2
ROWS: dict[str, tuple[list[int], ...]] = {
    "one document": ([12],),
    "a document in each row": ([12], [12]),
    "many, some of one length": ([4, 4, 1, 3], [1, 1, 4, 6]),
    "documents of one token": ([1] * 12, [1] * 12),
    "longest first": ([11, 1], [2, 10]),
}
# The window, whether there are sinks, and the widths of a key and of a value.
KINDS: dict[str, tuple[int, bool, int, int]] = {
    "plain": (0, False, 8, 8),
    "window": (3, False, 8, 8),
    "window of one token": (1, False, 8, 8),
    "sinks": (0, True, 8, 8),
    "sinks under a window": (3, True, 8, 8),
    "latent widths": (0, False, 10, 6),
}


def inputs(starts: Tensor, kind: str) -> list[Tensor]:
    """Queries, keys, values and, where the kind has them, sinks."""
    _, has_sinks, width, value_width = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    shapes = [(*starts.shape, HEADS, width), (*starts.shape, KV_HEADS, width), (*starts.shape, KV_HEADS, value_width)]
    shapes += [(HEADS,)] * has_sinks
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def outputs_and_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_outputs_and_gradients_are_those_of_the_mask(rows: str, kind: str) -> None:
    starts, window = starts_of(*ROWS[rows]), KINDS[kind][0]
    documents, mask = Documents.from_starts(starts).with_window(window), under_window(mask_of_documents(starts), window)

    def by(seen: Documents | Tensor) -> Callable[..., Tensor]:
        return lambda q, k, v, sinks=None: attend(q, k, v, seen, scale=0.4, sinks=sinks)

    leaves = inputs(starts, kind)
    expect_equal(outputs_and_gradients(by(documents), leaves), outputs_and_gradients(by(mask), leaves))


def test_blocks_are_documents_or_windows_of_them() -> None:
    documents = Documents.from_starts(starts_of([5, 2, 1], [8]))
    assert documents.lengths == (5, 2, 1, 8)
    assert documents.offsets.tolist() == [0, 5, 7, 8, 16]
    assert documents.window_cut.blocks == [QueryBlock(5, 0), QueryBlock(2, 0), QueryBlock(1, 0), QueryBlock(8, 0)]
    near = documents.with_window(3).window_cut
    assert near.blocks == [(3, 0), (2, 3), (2, 0), (1, 0), (3, 0), (3, 3), (2, 3)]
    assert near.parts == [3, 2, 2, 1, 3, 3, 2]
    assert [list(each) for each in near.key_parts] == [[0], [0, 1], [2], [3], [4], [4, 5], [5, 6]]
    assert near.indices_by_block[QueryBlock(2, 3)] == [1, 6]
    assert Documents.whole_rows(2, 8, torch.device("cpu")).lengths == (8, 8)


def test_a_rank_sees_its_documents_from_their_beginning_or_from_a_window_before() -> None:
    # Places 4 to 7 of rows of 8:  a a a b | b b c c  and  a a a a | a a a a
    second = Context(1, 2, None)  # type: ignore[arg-type]
    documents = Documents.from_starts(starts_of([3, 3, 2], [8]), second)
    cut = documents.document_cut
    assert cut.parts == [3, 1, 2, 2, 4, 4]
    assert cut.blocks == [(2, 1), (2, 0), (4, 4)]
    assert [list(each) for each in cut.key_parts] == [[1, 2], [3], [4, 5]]
    near = documents.with_window(3).window_cut
    assert near.parts == [3, 1, 2, 2, 1, 3, 3, 1]
    assert near.blocks == [(2, 1), (2, 0), (3, 3), (1, 3)]
    assert [list(each) for each in near.key_parts] == [[1, 2], [3], [5, 6], [6, 7]]


# --- the kernel of CUDA ------------------------------------------------------------------------------------------


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What flash attention promises: heads of one width, a multiple of 8; a query sees `left` keys before its own."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    left, right = window_size
    assert right == 0
    found = []
    both = ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
    for parts in zip(*(each.split(offsets.diff().tolist()) for each, offsets in both), strict=True):
        q, k, v = (part.transpose(0, 1) for part in parts)
        before = k.shape[1] - q.shape[1]  # the last query sees the last key
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(before)
        seen = seen if left < 0 else seen.triu(before - left)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        found.append(attended.transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("kind", [kind for kind, (_, has_sinks, *_) in KINDS.items() if not has_sinks])
def test_one_kernel_for_all_documents_gives_the_same(kind: str) -> None:
    starts = starts_of(*ROWS["many, some of one length"])
    documents = Documents.from_starts(starts).with_window(KINDS[kind][0])
    leaves = inputs(starts, kind)
    found = outputs_and_gradients(lambda q, k, v: attend_by_varlen(q, k, v, documents, None, slow_varlen), leaves)
    expect_equal(found, outputs_and_gradients(lambda q, k, v: attend(q, k, v, documents), leaves))


def test_the_kernel_of_this_torch_takes_what_it_is_given() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    documents = Documents.from_starts(starts_of([5, 2, 1], [8])).with_window(3)
    with FakeTensorMode(allow_non_fake_inputs=True):  # it checks arguments and shapes, and computes nothing
        queries, keys = (torch.empty(2, 8, heads, 8, requires_grad=True) for heads in (HEADS, KV_HEADS))
        y = attend_by_varlen(queries, keys, keys, documents, None, varlen)
        y.sum().backward()
        assert y.shape == queries.shape
        assert queries.grad is not None


def test_the_kernel_gets_what_autocast_would_make_of_its_inputs() -> None:
    seen_dtypes = []

    def note(query: Tensor, *others: Any, **_options: Any) -> Tensor:
        seen_dtypes.extend([query.dtype, *(each.dtype for each in others[:2])])
        return query

    starts = starts_of([4, 4])
    queries, keys, values = (each.float() for each in inputs(starts, "plain"))
    with torch.autocast("cpu", torch.bfloat16):
        attend_by_varlen(queries, keys, values, Documents.from_starts(starts), None, note)
    assert seen_dtypes == [torch.bfloat16] * 3


def test_a_cpu_has_no_such_kernel() -> None:
    x = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    assert varlen_kernel(x, x) is None


# --- whole models ------------------------------------------------------------------------------------------------

LATENT = {"attention": "latent", "latent": LatentConfig(query_rank=6, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)}


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("settings", [VARIANT, LATENT], ids=["variant", "latent"])
@pytest.mark.parametrize("rows", ROWS)
def test_recompute_gives_the_same(settings: dict[str, Any], recompute: Recompute, rows: str) -> None:
    model = build(recompute=recompute, **settings).double()
    starts = starts_of(*ROWS[rows])
    ids = tokens(len(starts), 12)
    with whole_masks():
        wanted = learn(model, ids, starts)
    expect_equal(learn(model, ids, starts), wanted)


def test_a_rank_without_sequences_goes_forward_and_backward() -> None:
    model = build(**VARIANT)
    loss = model(tokens(0, 5), document_starts=torch.zeros(0, 5, dtype=torch.int64), targets=tokens(0, 5)).total
    loss.backward()
    assert loss == 0


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes, in backward too."""

    elements = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        made = found if isinstance(found, tuple | list) else [found]
        for each in made:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return found


SEQ_LEN = 1024
DOCUMENTS = starts_of([64] * 8 + [32, 33, 63, 1] + [77, 50] * 3 + [2])


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("settings", [{}, VARIANT, LATENT], ids=["plain", "variant", "latent"])
def test_nothing_is_as_large_as_the_square_of_a_row(settings: dict[str, Any], recompute: Recompute) -> None:
    model = build(max_seq_len=SEQ_LEN, recompute=recompute, **settings)
    starts = torch.cat([DOCUMENTS, torch.full((1, SEQ_LEN - DOCUMENTS.shape[1]), DOCUMENTS.shape[1])], 1)
    with Largest() as largest:
        learn(model, tokens(1, SEQ_LEN), starts)
    assert largest.elements < SEQ_LEN**2 / 2
    with whole_masks(), Largest() as largest:
        learn(model, tokens(1, SEQ_LEN), starts)
    assert largest.elements >= SEQ_LEN**2


def test_a_window_in_a_row_of_one_document_makes_nothing_that_large() -> None:
    model = build(max_seq_len=SEQ_LEN, sliding_window=16, attention_sinks=True)
    with Largest() as largest:
        learn(model, tokens(1, SEQ_LEN), None)
    assert largest.elements < SEQ_LEN**2 / 8
