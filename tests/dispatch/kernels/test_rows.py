"""Sums and copies of rows against indexing in float64."""

import pytest
import torch

from tests.dispatch.kernels.device import DEVICE, assert_close, drawn, where_kernels_run

pytestmark = where_kernels_run()

# Copies of each source. 11 and 20 take more than one round of 8; a source without a copy at either end and between.
RAGGED, ALL_TO_ONE = (0, 3, 1, 11, 0, 2, 0), (0, 20, 0)


def _map(counts, index_dtype):
    """The source of each copy in a shuffled order, all copies by source, where those of each begin."""
    sources = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    sources = sources[torch.randperm(len(sources), generator=torch.Generator().manual_seed(0))]
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    return [part.to(DEVICE, index_dtype) for part in (sources, sources.argsort(stable=True), first)]


@pytest.mark.parametrize(
    ("counts", "width", "dtype", "index_dtype"),
    [
        (RAGGED, 70, torch.bfloat16, torch.int64),
        (RAGGED, 1100, torch.bfloat16, torch.int32),  # two tiles, the second not full
        (ALL_TO_ONE, 8, torch.float32, torch.int64),
        (RAGGED, 33, torch.float64, torch.int32),
        ((1,), 5, torch.float32, torch.int32),
    ],
)
def test_sums_and_copies_equal_indexing(counts, width, dtype, index_dtype):
    from dispatch.kernels.rows import copy_rows, sum_rows

    sources, order, first = _map(counts, index_dtype)
    rows, copies = (drawn(size, width, dtype=dtype) for size in (len(counts), len(sources)))
    assert torch.equal(copy_rows(rows, order, first), rows[sources.long()])
    zero = torch.zeros(len(counts), width, dtype=torch.float64, device=DEVICE)
    assert_close(sum_rows(copies, order, first), zero.index_add(0, sources.long(), copies.double()))


def test_sums_are_rounded_once_and_rows_need_not_be_contiguous():
    from dispatch.kernels.rows import copy_rows, sum_rows

    # 256 + 1 + ... + 1 stays 256 if each sum is rounded to bf16, whose next number is 258.
    ones = torch.ones(10, 3, dtype=torch.bfloat16, device=DEVICE)
    ones[0] = 256
    _, order, first = _map((10,), torch.int64)
    assert sum_rows(ones, order, first).tolist() == [[265 - 1] * 3]  # 265 rounds to the even neighbour
    wide = drawn(3, 4).expand(10, 3, 4)[:, 1]  # stride 0, as the gradient of a sum has
    assert torch.equal(sum_rows(wide, order, first), wide.sum(0, keepdim=True).double())
    assert torch.equal(copy_rows(drawn(4, 1).t(), order, first), drawn(4, 1).t().expand(10, 4))


def test_without_sources_or_copies_nothing_is_launched():
    from dispatch.kernels.rows import copy_rows, sum_rows

    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert sum_rows(drawn(0, 6), none, none.new_zeros(2)).tolist() == [[0] * 6] * 2
    assert sum_rows(drawn(0, 6), none, none).shape == copy_rows(drawn(0, 6), none, none).shape == (0, 6)
    assert copy_rows(drawn(2, 6), none, none.new_zeros(2)).shape == (0, 6)
