"""Optimizer state in host memory (`optim.offload states`): pieces of it come to the device, are updated and go back.

The update is made where it would be made without, by the optimizer's own code: any registered one serves, and every bit
stays. On CUDA the state lies in pinned memory; the next piece arrives while one is updated and leaves, on streams of
their own. With `cpu` as the device the same code copies from the host to the host.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor, nn

from workers.distributed.sharded import local_rows

State = dict[str, Tensor]


def in_host_memory(state: State) -> State:
    """The same state with this rank's rows of each tensor on the host, pinned where they come from CUDA.

    Numbers stay on the device: what they would free is nothing, and a fused update wants AdamW's `step` there.
    """
    return {key: _copy_on_host(value) if _moves(value) else value for key, value in state.items()}


class HostStates:
    """Steps an optimizer whose state lies in host memory between steps.

    Args:
        initial_state: of a parameter and its name, on the host already (`OptimConfig.initial_state`).
        piece_bytes: state that comes to the device at once; a parameter with more is a piece by itself.
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
        """As the optimizer's, whose `step` is called once for each piece: gradients of all others are hidden then.

        Waits for the device: the state is whole on the host afterwards, for whoever saves it.
        """
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        pieces = list(self._pieces(gradients))
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

    def _pieces(self, parameters: Iterable[Tensor]) -> "Iterator[_Piece]":
        """Runs of parameters, in the optimizer's order: ranks that gather a matrix together do so in the same order."""
        states: dict[Tensor, State] = {}
        size = 0
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            if not state:
                state.update(self._initial_state(self._names[parameter], parameter))
            num_bytes = sum(each.nbytes for each in state.values() if _moves(each))
            if states and size + num_bytes > self._piece_bytes:
                yield _Piece(states)
                states, size = {}, 0
            states[parameter] = state
            size += num_bytes
        if states:
            yield _Piece(states)


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
        """Let what is computed from now on see the state."""
        copies.hold_device(self._arrived)

    def send_back(self, copies: "_Copies") -> None:
        """Start the copies to the host, after the update."""
        self._sent = copies.start(self._copy_out)

    def leave(self) -> None:
        """Free the device when all copies have ended. Blocks the host: else it would run ahead and bring all pieces."""
        if self._sent is not None:
            self._sent.synchronize()
        for state, on_host in zip(self.states.values(), self._on_host, strict=True):
            state.update(on_host)

    def _copy_in(self) -> None:
        for (parameter, state), on_host in zip(self.states.items(), self._on_host, strict=True):
            state.update({key: on_device(value, parameter) for key, value in on_host.items()})

    def _copy_out(self) -> None:
        for state, on_host in zip(self.states.values(), self._on_host, strict=True):
            for key, value in state.items():
                if key in on_host:
                    on_host[key].copy_(local_rows(value)[0], non_blocking=True)
                elif _moves(value):  # the optimizer made it in this step
                    on_host[key] = _copy_on_host(value)


class _Copies:
    """Copies between host and device: on CUDA on a stream of their own, after all that was started before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, copy: Callable[[], None]) -> torch.cuda.Event | None:
        """Run it, and return the event of its end, None where it has ended already."""
        if self._stream is None:
            copy()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        ended = torch.cuda.Event()
        ended.record(self._stream)
        return ended

    def hold_device(self, event: torch.cuda.Event | None) -> None:
        """Let the device wait for an event before what is started from now on."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def on_device(on_host: Tensor, parameter: Tensor) -> Tensor:
    """A copy where the parameter is, sharded as it is if these are as many rows as this rank has of it.

    Its memory is freed after `_Piece.leave` has waited for the last copy, so that no stream can still use it.
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
    """Page-lock it as it is: `pin_memory` rounds each block up to a power of two (pytorch #150517)."""
    runtime, place = torch.cuda.cudart(), on_host.data_ptr()
    torch.cuda.check_error(int(runtime.cudaHostRegister(place, on_host.nbytes, 0)))
    # With the storage, of which the parts in a checkpoint are views; not at exit, when CUDA may be gone before.
    weakref.finalize(on_host.untyped_storage(), runtime.cudaHostUnregister, place).atexit = False


def _moves(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
