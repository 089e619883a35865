"""The comparison: runs every case on the ranks and by the slow reference, and says what differs by how much."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.exchange.placement import ExpertPlacement
from dispatch.parity.cases import Case, CaseInputs, draw_batches, draw_weights, is_expert_weight
from dispatch.parity.layers import Adapter, slow_layer
from dispatch.parity.measure import COLUMNS, OPTIMIZERS, Measured, measure
from dispatch.values import all_gather_values, read_tensor, tensor_value

FLOOR = 1e-4  # smaller elements are compared by their absolute error, see `Precision`


@dataclass(frozen=True)
class Precision:
    """How exact the results of a dtype must be.

    limit: the largest relative error of an element; for elements below FLOOR, limit * FLOOR is the largest absolute
    error. scaled: take errors relative to the largest element of the tensor, since the rounding of narrow dtypes has
    its size. optimizers: keys of OPTIMIZERS whose steps are compared.
    """

    limit: float
    scaled: bool = True
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)


PRECISIONS = {
    "float64": Precision(1e-10, scaled=False),
    "float32": Precision(1e-4),
    # No AdamW: it divides a gradient by its size, so that the rounding of small ones would move weights by whole steps.
    "bfloat16": Precision(5e-2, optimizers=("SGD",)),
}


@dataclass(frozen=True)
class Deviation:
    """How far one tensor of one rank is from the reference.

    error: the largest relative error of an element; infinite where the tensor is missing or not a number. magnitude:
    the largest element of the reference. note: what else is wrong; empty where nothing is.
    """

    column: str
    tensor: str
    rank: int
    error: float
    magnitude: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """The result of one case with one layer: the deviations of all tensors on all ranks."""

    case: str
    layer: str
    precision: Precision
    deviations: tuple[Deviation, ...]

    def worst(self, column: str) -> float:
        """The largest error of a column of the report; 0 where nothing of it was compared."""
        return max((d.error for d in self.deviations if d.column == column), default=0.0)

    @property
    def failures(self) -> list[Deviation]:
        """The deviations that are too large, causes before effects: by column, then the largest error first."""
        off = [d for d in self.deviations if d.note or not d.error <= self.precision.limit]
        return sorted(off, key=lambda d: (COLUMNS.index(d.column), -d.error))


def check(
    cases: Sequence[Case],
    adapters: Mapping[str, Adapter],
    group: dist.ProcessGroup,
    *,
    dtype: str = "float64",
    device: torch.device | None = None,
    seed: int = 0,
) -> list[Row]:
    """Compare each of `adapters` with the reference in each of `cases`; the same rows on every rank.

    Collective over `group`, the EP group. Turn on torch.use_deterministic_algorithms first: it fills uninitialised
    memory with NaN, so that a row that nobody wrote shows.
    """
    precision, references = PRECISIONS[dtype], _references(cases, group, dtype, seed)
    rank, ep_size, rows = dist.get_rank(group), dist.get_world_size(group), []
    for case in cases:
        weights, batches = _draw(case, ep_size, dtype, seed)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        expected = _part(references[case.name], batches, rank, ExpertPlacement(case.config.num_experts, ep_size))
        num_tokens = sum(len(batch.x_TH) for batch in batches)
        for name, adapter in adapters.items():
            build = partial(adapter, case, weights, group)
            measured = measure(build, case, batches[rank], num_tokens, group, precision.optimizers)
            mine = compare(measured, expected, rank, precision)
            rows.append(Row(case.name, name, precision, _gathered(mine, group)))
    return rows


def compare(measured: Measured, expected: Measured, rank: int, precision: Precision) -> list[Deviation]:
    """The deviation of every expected tensor."""
    return [
        _deviation(column, name, rank, measured[column].get(name), want, precision)
        for column, tensors in expected.items()
        for name, want in tensors.items()
    ]


def _deviation(column: str, name: str, rank: int, got: Tensor | None, want: Tensor, precision: Precision) -> Deviation:
    magnitude, infinite = float(want.abs().max()) if want.numel() else 0.0, float("inf")
    if got is None or got.shape != want.shape:
        note = "missing" if got is None else f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        return Deviation(column, name, rank, infinite, magnitude, note)
    if not want.numel():
        return Deviation(column, name, rank, 0.0, magnitude)
    size = want.abs().clamp_min(max(FLOOR, magnitude if precision.scaled else 0.0))
    error = float(((got - want).abs() / size).max())
    if error != error:  # noqa: PLR0124 - NaN
        return Deviation(column, name, rank, infinite, magnitude, "not a number")
    # Numbers below the floor would pass whatever they are, so that a comparison of them proves nothing.
    note = "too small to compare" if 0 < magnitude <= FLOOR else ""
    return Deviation(column, name, rank, error, magnitude, note)


def _references(cases: Sequence[Case], group: dist.ProcessGroup, dtype: str, seed: int) -> dict[str, Measured]:
    """The results of the slow reference for the global batch of each case. Each rank computes some of the cases."""
    rank, ep_size = dist.get_rank(group), dist.get_world_size(group)
    mine = {case.name: _reference(case, ep_size, dtype, seed) for case in cases[rank::ep_size]}
    shares = all_gather_values(_mapped(tensor_value, mine), group, lambda value: _mapped(read_tensor, value), 1 << 30)
    return {name: measured for share in shares for name, measured in share.items()}


def _mapped(change: Callable[[Any], Any], by_case: Mapping[str, Measured]) -> dict[str, Any]:
    """The results with `change` applied to every tensor."""
    return {
        case: {column: {name: change(each) for name, each in tensors.items()} for column, tensors in measured.items()}
        for case, measured in by_case.items()
    }


def _reference(case: Case, ep_size: int, dtype: str, seed: int) -> Measured:
    weights, batches = _draw(case, ep_size, dtype, seed)
    exact = {name: weight.double() for name, weight in weights.items()}
    global_batch = CaseInputs(torch.cat([b.x_TH for b in batches]), torch.cat([b.grad_output_TH for b in batches]))
    optimizers = PRECISIONS[dtype].optimizers
    return measure(lambda: slow_layer(case, exact), case, global_batch, len(global_batch.x_TH), None, optimizers)


def _draw(case: Case, ep_size: int, dtype: str, seed: int) -> tuple[dict[str, Tensor], list[CaseInputs]]:
    weights = draw_weights(case, getattr(torch, dtype), seed)
    return weights, draw_batches(case, ep_size, weights, seed)


def _part(reference: Measured, batches: Sequence[CaseInputs], rank: int, placement: ExpertPlacement) -> Measured:
    """What this rank is compared with: the rows of its tokens, the weights of its experts, all other tensors entire."""
    first = sum(len(batch.x_TH) for batch in batches[:rank])
    tokens, ids = slice(first, first + len(batches[rank].x_TH)), placement.owned_by(rank)

    def part(name: str, tensor: Tensor) -> Tensor:
        if name in ("y", "dx"):
            return tensor[tokens]
        return tensor[ids.start : ids.stop] if is_expert_weight(name) else tensor

    return {column: {name: part(name, each) for name, each in tensors.items()} for column, tensors in reference.items()}


def _gathered(mine: Sequence[Deviation], group: dist.ProcessGroup) -> tuple[Deviation, ...]:
    """The deviations of all ranks. Collective."""
    rows_by_rank = all_gather_values([astuple(each) for each in mine], group, list)
    return tuple(Deviation(*row) for rows in rows_by_rank for row in rows)
