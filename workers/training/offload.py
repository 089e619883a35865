"""Optimizer state in host memory (`optim.offload states`): pieces of it come to the device, are updated and go back.

The optimizer itself makes the update, on the device of the parameters: any registered optimizer serves, and results
are those without offload, bit for bit. On CUDA the state lies in pinned memory; one piece arrives while the one before
is updated and goes back, on two streams beside that of the update. On a CPU the same code copies within host memory.
"""

import weakref
from collections.abc import Callable, Iterable
from itertools import zip_longest

import torch
from torch import Tensor, nn

from workers.distributed.sharded import local_rows

State = dict[str, Tensor]


def move_to_host(state: State) -> State:
    """The same state with this rank's rows of each tensor on the host, pinned where they come from CUDA.

    Tensors without dimensions stay on the device: they take no memory, and torch's fused AdamW wants `step` there.
    """
    return {key: _copy_on_host(value) if _moves(value) else value for key, value in state.items()}


class HostStates:
    """Steps an optimizer whose state lies in host memory between steps.

    Args:
        initial_state: makes the state of a parameter of this name, on the host already (`OptimConfig.initial_state`).
        piece_bytes: largest size of a piece; a parameter with more state is a piece by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        initial_state: Callable[[str, Tensor], State],
        piece_bytes: int,
    ) -> None:
        self._optimizer, self._initial_state, self._piece_bytes = optimizer, initial_state, piece_bytes
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._inward, self._outward = (_Copies(next(model.parameters()).device) for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        """Make one optimizer step, by calling the optimizer once for each piece while all other gradients are hidden.

        Waits for the device: afterwards all state is on the host, where a checkpoint reads it.
        """
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        pieces = self._pieces(gradients)
        try:
            self._update(pieces, gradients)
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for piece in pieces:
                piece.leave()

    def _update(self, pieces: "list[_Piece]", gradients: dict[Tensor, Tensor]) -> None:
        before: _Piece | None = None
        for piece, following in zip_longest([None, *pieces], pieces):
            # The piece before leaves before another one arrives: at most PIECES_AT_ONCE are on the device.
            if before is not None:
                before.leave()
            if following is not None:
                following.arrive(self._inward)
            if piece is not None:
                piece.wait(self._inward)
                self._step_alone(piece, gradients)
                piece.send_back(self._outward)
            before = piece

    def _step_alone(self, piece: "_Piece", gradients: dict[Tensor, Tensor]) -> None:
        for parameter in piece.states:
            parameter.grad = gradients[parameter]
        self._optimizer.step()
        for parameter in piece.states:
            parameter.grad = None

    def _pieces(self, parameters: Iterable[Tensor]) -> "list[_Piece]":
        """Divide the states of the parameters into pieces; parameters without state get the initial one.

        In the optimizer's order, which is the same on all ranks: an optimizer may gather parameters as it goes.
        """
        pieces: list[dict[Tensor, State]] = [{}]
        size = 0
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            if not state:
                state.update(self._initial_state(self._names[parameter], parameter))
            num_bytes = sum(each.nbytes for each in state.values() if _moves(each))
            if pieces[-1] and size + num_bytes > self._piece_bytes:
                pieces.append({})
                size = 0
            pieces[-1][parameter] = state
            size += num_bytes
        return [_Piece(states) for states in pieces if states]


class _Piece:
    """The state of some parameters: on the device from `arrive` to `leave`, else on the host."""

    def __init__(self, states: dict[Tensor, State]) -> None:
        self.states = states
        self._on_host = [{key: value for key, value in each.items() if _moves(value)} for each in states.values()]
        self._arrived: torch.cuda.Event | None = None
        self._sent: torch.cuda.Event | None = None

    def arrive(self, copies: "_Copies") -> None:
        """Start the copies to the device."""
        self._arrived = copies.start(self._copy_in)

    def wait(self, copies: "_Copies") -> None:
        """Let kernels that are started from now on see the state."""
        copies.wait_on_device(self._arrived)

    def send_back(self, copies: "_Copies") -> None:
        """Start the copies to the host, after the update."""
        self._sent = copies.start(self._copy_out)

    def leave(self) -> None:
        """Free the state on the device once the copies have ended.

        Blocks the host, which would otherwise run ahead of the device and allocate all pieces at once.
        """
        if self._sent is not None:
            self._sent.synchronize()
        for state, on_host in zip(self.states.values(), self._on_host, strict=True):
            state.update(on_host)

    def _copy_in(self) -> None:
        for (parameter, state), on_host in zip(self.states.items(), self._on_host, strict=True):
            state.update({key: copy_to_device(value, parameter) for key, value in on_host.items()})

    def _copy_out(self) -> None:
        for state, on_host in zip(self.states.values(), self._on_host, strict=True):
            for key, value in state.items():
                if key in on_host:
                    on_host[key].copy_(local_rows(value)[0], non_blocking=True)
                elif _moves(value):  # the optimizer made it in this step
                    on_host[key] = _copy_on_host(value)


class _Copies:
    """Copies between host and device, in one direction: on CUDA on their own stream, after kernels started before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, copy: Callable[[], None]) -> torch.cuda.Event | None:
        """Start the copies, and return an event that marks their end; None where they have ended already."""
        if self._stream is None:
            copy()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        ended = torch.cuda.Event()
        ended.record(self._stream)
        return ended

    def wait_on_device(self, event: torch.cuda.Event | None) -> None:
        """Let kernels that are started from now on wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def copy_to_device(on_host: Tensor, parameter: Tensor) -> Tensor:
    """Copy state to the device of its parameter; state of the shape of this rank's rows becomes a DTensor like that.

    The copy is allocated on one stream and used on others. That needs no `record_stream`: `_Piece.leave` waits for the
    last use before it frees the copy.
    """
    rows = local_rows(parameter)[0]
    like = parameter if rows.shape == on_host.shape else torch.empty_like(on_host, device=rows.device)
    value = torch.empty_like(like, dtype=on_host.dtype)
    local_rows(value)[0].copy_(on_host, non_blocking=True)
    return value


def _copy_on_host(value: Tensor) -> Tensor:
    rows = local_rows(value)[0]
    on_host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu")
    if rows.is_cuda and rows.numel():
        _pin(on_host)
    return on_host.copy_(rows)


def _pin(on_host: Tensor) -> None:
    """Page-lock a tensor in place: `pin_memory` rounds each block up to a power of two (pytorch #150517)."""
    runtime, address = torch.cuda.cudart(), on_host.data_ptr()
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, on_host.nbytes, 0)))
    # Unlocked when the storage is freed and not the tensor: parts of a checkpoint are views of the storage. Not at
    # exit, as CUDA may be shut down before.
    weakref.finalize(on_host.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False


def _moves(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
