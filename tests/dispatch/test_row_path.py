"""A token's row passes the files that docs/architecture.md names: it is followed through a layer on two ranks."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.config import MoEConfig
from dispatch.exchange.factory import make_dispatcher
from dispatch.layer import MoELayer
from tests.documented_paths import ROOT, documented_path
from tests.ranks import run_ranks

MAX_FILES, MAX_LINES = 8, 1200
# Not 24 wide: the weights of a row's 3 experts are 24 bytes, and would be taken for a row.
NUM_EXPERTS, TOP_K, HIDDEN, FFN_HIDDEN = 8, 3, 40, 28
ROW_WIDTHS = {HIDDEN, 2 * FFN_HIDDEN, FFN_HIDDEN}

# Given a row, these answer a question about it or give memory for it: what becomes of it does not depend on them.
BESIDE = {
    "dispatch/diagnosis/activity_tracker.py",  # notes the collective, for the report of a hang
    "dispatch/exchange/buffer_pool.py",  # memory like that of a row
    "dispatch/exchange/dispatcher.py",  # whether the shapes fit together
    "dispatch/experts/grouped.py",  # whether the batch is small
    "dispatch/experts/grouped_matmul.py",  # whether torch has a kernel
    "dispatch/kernels/availability.py",  # whether Triton has one
}


def _holds_row(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_row, value))
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] in ROW_WIDTHS


def _files_passed(rank: int, world_size: int) -> set[str]:
    """The files of ours with a function that is given a row of the forward pass, or returns one."""
    dispatcher = make_dispatcher(NUM_EXPERTS, dist.group.WORLD, hidden=HIDDEN, top_k=TOP_K, exchange="rank")
    config = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, ffn_hidden=FFN_HIDDEN, num_shared_experts=0)
    # fp64, for which torch has no grouped matmul: one expert after the other, as with large batches.
    layer, x_TH = MoELayer(HIDDEN, config, dispatcher).double(), torch.randn(6, HIDDEN, dtype=torch.float64)
    passed: set[str] = set()

    def follow(frame: FrameType, event: str, returned: Any) -> None:
        seen = list(frame.f_locals.values()) if event == "call" else returned if event == "return" else None
        if _holds_row(seen):
            passed.add(frame.f_code.co_filename)

    sys.setprofile(follow)
    try:
        layer(x_TH)
    finally:
        sys.setprofile(None)
    return {str(Path(file).relative_to(ROOT)) for file in passed if Path(file).is_relative_to(ROOT / "dispatch")}


def test_a_row_passes_the_files_that_the_architecture_names_at_most_8_of_1200_lines() -> None:
    path = documented_path("a token's row")
    assert len(path) <= MAX_FILES
    assert sum(len((ROOT / file).read_text().splitlines()) for file in path) <= MAX_LINES
    for passed in run_ranks(2, _files_passed):
        assert passed - BESIDE == set(path)
