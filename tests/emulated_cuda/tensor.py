"""Tensors on the emulated device, and what every operation of torch does with them."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
# The host reads what they give, or their size depends on it.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}


class HostWaits:
    """Where the host waited for the device, by file and function, and the copies to the host that are under way."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._under_way: list[tuple[Tensor, Tensor]] = []
        self._is_forbidden = False

    def forbid(self, mode: str) -> None:
        """What `torch.cuda.set_sync_debug_mode` does; mode: error or default."""
        self._is_forbidden = mode == "error"

    def note(self) -> None:
        """The host waits here: all copies arrive."""
        if self._is_forbidden:
            raise RuntimeError(f"called a synchronizing CUDA operation in {_caller()}")
        self.counts[_caller()] += 1
        under_way, self._under_way = self._under_way, []
        for target, values in under_way:
            target.copy_(values)

    def start_copy(self, target: Tensor, values: Tensor) -> None:
        """A copy to the host, of the values as they are now."""
        self._under_way.append((target, values.clone()))
        poison(target)


WAITS = HostWaits()


class OnDevice(Tensor):
    """A tensor of cuda:0. held: its values, in a CPU tensor of the same strides."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        """All is done in __new__."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.held!r})"

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: Tensor) -> None:
        Tensor.data.__set__(self, other)
        self.held = held_of(other.detach())

    def tolist(self) -> Any:  # torch has none for subclasses
        WAITS.note()
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


class MakesTensors(TorchDispatchMode):
    """Functions without a tensor among their arguments that are asked for one on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in {Tensor, torch.nn.Parameter, OnDevice} for kind in types):
            return NotImplemented  # DTensor, whose parts come here again
        return run(func, args, kwargs or {})


def held_of(value: Any) -> Any:
    """The CPU tensor of a tensor on the device; anything else as it is."""
    return value.held if isinstance(value, OnDevice) else value


def poison(held: Tensor) -> None:
    """Overwrite what must not be read."""
    is_float = held.is_floating_point() or held.is_complex()
    held.fill_(float("nan") if is_float else True if held.dtype == torch.bool else torch.iinfo(held.dtype).max)


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives, on the device where its tensors are or where it was asked for."""
    if func is aten._to_copy.default:
        return _to(func, args[0], **kwargs)
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
    if ours and any(tensor.ndim and not isinstance(tensor, OnDevice) for tensor in tensors):
        places = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
        raise RuntimeError(f"{func} expects all tensors to be on the same device, and got {places}")
    if ours and _waits(func, args, kwargs):
        WAITS.note()
    is_ours = bool(ours) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cuda"
    out = func(*tree_map_only(OnDevice, held_of, args), **_on_host(kwargs, is_ours))
    if not is_ours:
        return out
    out = tree_map_only(Tensor, lambda made: ours[id(made)] if id(made) in ours else OnDevice(_plain(made)), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and func.namespace == "aten" else out


def _on_host(kwargs: Mapping[str, Any], is_ours: bool) -> dict[str, Any]:
    held = tree_map_only(OnDevice, held_of, dict(kwargs))
    return held | ({"device": torch.device("cpu")} if is_ours and "device" in kwargs else {})


def _plain(made: Tensor) -> Tensor:
    """Without the bits for a conjugate or a negative, which the tensor around it does not have."""
    return made.resolve_conj().resolve_neg()


def _waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is aten.index.Tensor:
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return func in WAITING


def _to(func: Any, source: Tensor, **kwargs: Any) -> Tensor:
    """`Tensor.to` another device, dtype or layout."""
    was_ours, device = isinstance(source, OnDevice), kwargs.pop("device", None)
    is_ours = was_ours if device is None else torch.device(device).type == "cuda"
    non_blocking = kwargs.get("non_blocking", False)
    on_host = {} if device is None or is_ours else {"device": device}
    kwargs.pop("pin_memory", None)
    made: Tensor = func(held_of(source), **kwargs, **on_host)
    if was_ours and not is_ours and non_blocking:
        WAITS.start_copy(made, made)
    elif was_ours != is_ours and not non_blocking:
        WAITS.note()
    return OnDevice(made) if is_ours else made


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`Tensor.copy_`."""
    to_host = isinstance(source, OnDevice) and not isinstance(target, OnDevice)
    from_host = isinstance(target, OnDevice) and not isinstance(source, OnDevice) and source.ndim > 0
    if to_host and non_blocking:
        WAITS.start_copy(target, held_of(source))
        return target
    if (to_host or from_host) and not non_blocking:
        WAITS.note()
    held_of(target).copy_(held_of(source))
    return target


def _caller() -> str:
    """File and function of this project that an operation was called from."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and ".venv" not in file.parts and file.parent != Path(__file__).parent:
            return f"{file.relative_to(ROOT)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
