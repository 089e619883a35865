"""A few rows, each times the matrix of its expert, against indexing in float64."""

import pytest
import torch

from tests.dispatch.kernels.device import DEVICE, assert_close, drawn, where_kernels_run

pytestmark = where_kernels_run()


@pytest.mark.parametrize(
    ("counts", "num_outputs", "width", "dtype"),
    [
        ((0, 3, 0, 1, 0), 33, 300, torch.float32),
        ((0, 2), 16, 128, torch.bfloat16),
        ((1,), 3, 5, torch.float64),
        ((0, 0), 3, 5, torch.float32),
    ],
)
def test_each_row_meets_the_matrix_of_its_expert(counts, num_outputs, width, dtype):
    from dispatch.kernels.few_rows import few_rows_mm

    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(DEVICE)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)
    rows, matrices = drawn(3, width, dtype=dtype), drawn(len(counts), num_outputs, width, dtype=dtype, seed=1)
    sources = torch.tensor([2, 0, 2, 1], device=DEVICE)[: len(experts)]
    want = torch.einsum("rk,rnk->rn", rows[sources].double(), matrices[experts].double())
    assert_close(few_rows_mm(rows, sources, ends, matrices), want)
    assert_close(few_rows_mm(rows[sources], None, ends, matrices), want)
