"""The MoE layer: route, dispatch, experts, combine, shared experts.

Shapes: T tokens on this rank (may be 0, may differ by rank), H hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatch.board import Board
from dispatch.dispatcher import Dispatcher
from dispatch.errors import InvalidValue
from dispatch.experts import Experts
from dispatch.router import Router, RouterConfig
from dispatch.schedule import ScheduleConfig, mix


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RouterConfig):
    """One mixture-of-experts layer."""

    ffn_hidden: int = 128
    """Inner width of an expert."""
    num_shared_experts: int = 1
    """Experts that every token passes, computed as one feed-forward of this multiple of ffn_hidden; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_hidden < 1 or self.num_shared_experts < 0:
            raise InvalidValue(
                f"ffn_hidden ({self.ffn_hidden}) must be at least 1 and num_shared_experts ({self.num_shared_experts}) "
                "at least 0"
            )


class SwiGLU(nn.Module):
    """Dense feed-forward down(silu(gate(x)) * up(x)), for dense layers and shared experts; keeps the shape of x."""

    def __init__(self, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn_hidden, bias=False)
        self.up_proj = nn.Linear(hidden, ffn_hidden, bias=False)
        self.down_proj = nn.Linear(ffn_hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype rules as nn.Linear."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class MoELayer(nn.Module):
    """A drop-in feed-forward whose experts are spread over the ranks of the dispatcher's EP group.

    Args:
        hidden: width of a token.
        config: sizes and routing.
        dispatcher: how rows travel; it decides which experts this rank holds.
        schedule: the order of its work.

    Forward and backward are collective over the EP group: every rank calls them, also with zero tokens. No token is
    dropped. Move the bias once per optimizer step with `dispatch.balance`.
    """

    def __init__(
        self, hidden: int, config: MoEConfig, dispatcher: Dispatcher, schedule: ScheduleConfig | None = None
    ) -> None:
        super().__init__()
        if dispatcher.placement.num_experts != config.num_experts:
            raise InvalidValue(
                f"the dispatcher places {dispatcher.placement.num_experts} experts, the layer has "
                f"{config.num_experts}; build both with the same num_experts"
            )
        if dispatcher.top_k not in (None, config.top_k):
            raise InvalidValue(
                f"the dispatcher was made for top_k {dispatcher.top_k}, the layer has {config.top_k}; build both with "
                "the same top_k"
            )
        self.hidden, self.config, self.dispatcher = hidden, config, dispatcher
        self.name = ""  # see `name_layers`
        self.schedule = schedule or ScheduleConfig()
        self.router = Router(hidden, config)
        expert_ids = dispatcher.placement.owned_by(dispatcher.ep_rank)
        self.experts = Experts(hidden, config.ffn_hidden, expert_ids, dispatcher.meter, dispatcher.recycler)
        shared_hidden = config.ffn_hidden * config.num_shared_experts
        self.shared_experts = SwiGLU(hidden, shared_hidden) if shared_hidden else None

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Mix the experts' outputs for every token.

        Args:
            x: (..., hidden), float; (B, S, hidden) are B sequences, (T, hidden) one. Under autocast rows travel and
                experts compute in the autocast dtype.
            token_mask: (...) bool, False for padding; padding is computed but not counted in the load.
        Returns:
            (..., hidden) in the compute dtype.
        """
        if x.shape[-1] != self.hidden:
            raise ValueError(f"x has width {x.shape[-1]}, the layer was built for hidden {self.hidden}")
        board = self.dispatcher.meter.board
        board.layer = self.name
        if board.leaves_out("dispatch"):
            return torch.zeros_like(x)
        x_TH = x.reshape(-1, self.hidden)
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        topk_ids_TK, topk_weights_TK = self.router(x_TH, mask_T, x.shape[:-2].numel())
        y_TH = mix(
            _to_compute_dtype(x_TH),
            topk_ids_TK,
            topk_weights_TK,
            self.dispatcher,
            self.experts,
            self.schedule,
            lambda: None if self.shared_experts is None else self.shared_experts(x_TH),
        )
        return y_TH.reshape(x.shape)


def name_layers(model: nn.Module, board: Board) -> None:
    """Let the MoE layers of a model know their names, and the board their order: errors then say which layer.

    Without it errors leave the layer out, and a rank that skips one is not noticed at once.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    for name, layer in layers.items():
        layer.name = name
    board.layers = tuple(layers)


def _to_compute_dtype(x: Tensor) -> Tensor:
    # Before the rows travel: bf16 halves the bytes on the wire.
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x
