"""Matmuls of rows that lie in order of expert, each expert's rows with its own matrix.

Shapes: R expert rows (may be 0), L local experts, A and B widths.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatch.values import to_device

# On CUDA torch's grouped matmul has a kernel for bf16 and these major compute capabilities (Hopper, Blackwell). For
# others it copies the ends to the host and loops; `Groups` loops without waiting, as it has the counts on the host.
CAPABILITY_MAJORS = (9, 10)


@dataclass(frozen=True)
class Groups:
    """How many rows each expert has, on the host, and where they end, as int32 on the device."""

    counts_L: tuple[int, ...]
    ends_L: Tensor

    @classmethod
    def from_counts(cls, counts_L: tuple[int, ...], device: torch.device) -> "Groups":
        """From counts on the host. Does not wait for the device."""
        return cls(counts_L, to_device(torch.tensor([*itertools.accumulate(counts_L)], dtype=torch.int32), device))

    @property
    def runs(self) -> list[tuple[int, slice]]:
        """Each expert that has rows, and where they lie."""
        starts = itertools.accumulate(self.counts_L, initial=0)
        return [
            (expert, slice(start, start + count))
            for expert, (start, count) in enumerate(zip(starts, self.counts_L, strict=False))
            if count
        ]

    def mm(self, rows_RA: Tensor, matrices_LAB: Tensor) -> Tensor:
        """Rows times matrices, (R, B)."""
        if len(rows_RA) and takes_grouped_mm(rows_RA, matrices_LAB.shape[2]):
            return F.grouped_mm(rows_RA, matrices_LAB, offs=self.ends_L)
        out_RB = rows_RA.new_empty(len(rows_RA), matrices_LAB.shape[2])
        for expert, run in self.runs:
            torch.mm(rows_RA[run], matrices_LAB[expert], out=out_RB[run])
        return out_RB

    def outer(self, left_RA: Tensor, right_RB: Tensor) -> Tensor:
        """Transposed left rows times right rows of each expert, (L, A, B); zero for an expert without rows."""
        if len(left_RA) and takes_grouped_mm(left_RA, right_RB.shape[1]):
            return F.grouped_mm(left_RA.t(), right_RB, offs=self.ends_L)
        out_LAB = left_RA.new_zeros(len(self.counts_L), left_RA.shape[1], right_RB.shape[1])
        for expert, run in self.runs:
            torch.mm(left_RA[run].t(), right_RB[run], out=out_LAB[expert])
        return out_LAB


def takes_grouped_mm(rows_RA: Tensor, other_width: int) -> bool:
    """Whether torch has a grouped matmul for these rows: both widths are multiples of 16 bytes, and the dtype fits.

    other_width: B, of the results in `Groups.mm`, of the right rows in `Groups.outer`.
    """
    if any(width * rows_RA.element_size() % 16 for width in (rows_RA.shape[1], other_width)):
        return False
    if rows_RA.is_cuda:
        major, _ = torch.cuda.get_device_capability(rows_RA.device)
        return rows_RA.dtype == torch.bfloat16 and major in CAPABILITY_MAJORS
    return rows_RA.dtype in (torch.float32, torch.bfloat16)
