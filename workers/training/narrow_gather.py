"""Gathers the weights of linear layers in bfloat16 and all others in fp32, in one all-gather for each FSDP unit.

FSDP's MixedPrecisionPolicy knows one dtype for a unit, but a block also has norms and a router, which compute in fp32.
The gathered weights are fp32 tensors again; those of matmuls have values of bfloat16, so that the cast of autocast
gives the bits that it would give the fp32 masters. Gradients are accumulated and reduced in fp32.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# Private names, as FSDPModule.set_custom_all_gather takes this and torch.distributed.fsdp does not export it.
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from workers.distributed.sharded import gather_into, is_sharded, local_rows


def gather_narrow(unit: FSDPModule, num_owners: int) -> None:
    """Let an FSDP unit gather its linear weights in bfloat16. num_owners: ranks that shard its parameters."""
    parameters = [_UnitParameter(*found, num_owners) for found in _sharded_parameters(unit)]  # type: ignore[arg-type]
    unit.set_custom_all_gather(NarrowGather(parameters))


class _UnitParameter:
    """A sharded parameter of a unit. size: elements of a rank's rows, padded as FSDP does to the first rank's."""

    def __init__(self, module: nn.Module, name: str, num_owners: int) -> None:
        parameter = getattr(module, name)
        self._module, self._name = module, name
        self.is_narrow = isinstance(module, nn.Linear) and name == "weight"
        self.size = -(-parameter.shape[0] // num_owners) * math.prod(parameter.shape[1:])

    def is_in(self, padded: Tensor) -> bool:
        """Whether a part of FSDP's flat input holds this rank's rows of the parameter."""
        rows = local_rows(getattr(self._module, self._name))[0]
        return torch.equal(padded[: rows.numel()], rows.flatten())


class NarrowGather(AllGather):
    """The all-gather of one unit.

    Args:
        parameters: those of the unit in the order in which FSDP lays them out. FSDP does not promise an order: it is
            checked at the first call.
    """

    def __init__(self, parameters: Sequence[_UnitParameter]) -> None:
        self._unchecked: Sequence[_UnitParameter] = parameters
        self._sizes = [each.size for each in parameters]
        # A run: consecutive parameters that travel in the same dtype. It is copied as one piece.
        runs = [(narrow, sum(each.size for each in run)) for narrow, run in groupby(parameters, lambda p: p.is_narrow)]
        self._is_narrow, self._runs = [narrow for narrow, _ in runs], [size for _, size in runs]
        widths = [size if narrow else 2 * size for narrow, size in runs]  # in the buffer that travels, in bf16 elements
        # The fp32 runs come first in that buffer, and its length is even, by an element of padding where needed. So
        # fp32 begins at a multiple of 4 bytes in the part of each rank, as its view requires.
        self._order = sorted(range(len(runs)), key=lambda index: self._is_narrow[index])
        self._widths = [*(widths[index] for index in self._order), sum(widths) % 2]

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the buffer that FSDP takes the gathered weights from."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor` from the `input_tensor` of all ranks: fp32, flat; the input is a view of the output.

        The gather is not asynchronous, also with async_op: kernels started afterwards on this stream see its result,
        and so no work handle is returned.
        """
        self._check(input_tensor)
        own = input_tensor.new_zeros(sum(self._widths), dtype=torch.bfloat16)
        for packed, flat in self._pairs(own.unsqueeze(0), input_tensor.unsqueeze(0)):
            packed.copy_(flat)
        gathered = own.new_empty(group.size() * own.numel())
        gather_into(gathered, own, group)
        for packed, flat in self._pairs(gathered.view(group.size(), -1), output_tensor.view(group.size(), -1)):
            flat.copy_(packed)

    def _pairs(self, packed_PN: Tensor, flat_PN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views of one run: in the buffer that travels, bf16 or fp32, and in that of FSDP, fp32. P: ranks."""
        flat = flat_PN.split(self._runs, dim=1)
        *packed_runs, _padding = packed_PN.split(self._widths, dim=1)
        for index, packed in zip(self._order, packed_runs, strict=True):
            yield packed if self._is_narrow[index] else packed.view(torch.float32), flat[index]

    def _check(self, input_tensor: Tensor) -> None:
        parameters = self._unchecked
        if not parameters:
            return
        if len(input_tensor) != sum(self._sizes) or not all(
            each.is_in(padded) for each, padded in zip(parameters, input_tensor.split(self._sizes), strict=True)
        ):
            raise RuntimeError("FSDP of this torch lays out parameters otherwise than workers.training.narrow_gather")
        self._unchecked = ()


def _sharded_parameters(unit: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and name of each sharded parameter, in FSDP's order: children first, shared ones once, no nested units."""
    seen: set[nn.Module | nn.Parameter] = {unit}

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        for child in module.children():
            if child not in seen and not isinstance(child, FSDPModule):
                seen.add(child)
                yield from walk(child)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen and is_sharded(parameter):
                seen.add(parameter)
                yield module, name

    yield from walk(unit)
