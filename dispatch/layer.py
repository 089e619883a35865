"""The MoE layer: route, dispatch, experts, combine, shared experts.

Shapes: T tokens on this rank (may be 0, may differ by rank), H hidden.
"""

import torch
from torch import Tensor, nn

from dispatch.chunks import run_experts
from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.errors import InvalidValue
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.experts.dense import SwiGLU
from dispatch.experts.variants import make_experts
from dispatch.routing.replay import Routing, replay
from dispatch.routing.router import Router


class MoELayer(nn.Module):
    """A feed-forward of many experts, spread over the ranks of an expert-parallel (EP) group. No token is dropped.

    Forward and backward are collective over the EP group: every rank must call them, also a rank without tokens.
    Expert parameters differ between ranks (`expert_parameters` lists them); all others must be equal on all ranks, and
    their gradients summed over the ranks by the caller. `LossFreeBalancer` moves the bias after each optimizer step.

    Args:
        hidden: width of a token's vector.
        config: sizes and routing.
        dispatcher: sends tokens to their experts, and determines which experts this rank holds.
        schedule: chunks, overlap and the bound on memory; the default is one chunk, with overlap and without a bound.
    Raises:
        InvalidValue: the dispatcher was made for another num_experts or top_k than `config` has.

    Examples:
        One process, so a group of one rank; under torchrun it is `torch.distributed.group.WORLD`.

        >>> import torch
        >>> import torch.distributed as dist
        >>> from dispatch import MoEConfig, MoELayer, make_dispatcher
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dispatcher = make_dispatcher(num_experts=8, ep_group=dist.group.WORLD, hidden=32, top_k=2)
        >>> layer = MoELayer(32, MoEConfig(num_experts=8, top_k=2, ffn_hidden=64), dispatcher)
        >>> layer(torch.randn(4, 10, 32)).shape
        torch.Size([4, 10, 32])
        >>> layer.router.tokens_per_expert_E.sum()  # 40 tokens, 2 experts each
        tensor(80)
        >>> dist.destroy_process_group()
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
        self.experts = make_experts(hidden, config, expert_ids, dispatcher.meter, dispatcher.buffer_pool)
        shared_hidden = config.ffn_hidden * config.num_shared_experts
        self.shared_experts = SwiGLU(hidden, shared_hidden, config.shared_gate) if shared_hidden else None

    def forward(self, x: Tensor, token_mask: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Compute the weighted sum of the chosen experts' outputs, plus the shared experts', for every token.

        Args:
            x: (..., hidden), floating point. (B, S, hidden) are B sequences, (T, hidden) is one. Under autocast, rows
                travel and experts compute in the autocast dtype. The number of tokens may be 0 and differ by rank.
            token_mask: (...) bool, the shape of x without its last dimension; False marks padding, which is computed
                but not counted in the load. None counts every token.
            routing: experts to use in place of the router's choice; the router then counts nothing.
        Returns:
            The shape of x, in the compute dtype: the autocast dtype under autocast, else the dtype of x.
        Raises:
            ValueError: the last dimension of x is not `hidden`, or token_mask has another shape or dtype.
            InvalidValue: `routing` does not fit, see `Routing`.
        """
        if x.shape[-1] != self.hidden:
            raise ValueError(f"x has width {x.shape[-1]}, the layer was built for hidden {self.hidden}")
        if token_mask is not None and (token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool):
            got = f"{token_mask.dtype} {tuple(token_mask.shape)}"
            raise ValueError(f"token_mask is {got}; it must be torch.bool {tuple(x.shape[:-1])}, one entry a token")
        # Layers share a dispatcher, so each call notes its layer, for the messages of errors and hangs.
        self.dispatcher.meter.tracker.layer = self.name
        x_TH = x.reshape(-1, self.hidden)
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        if routing is None:
            topk_ids_TK, topk_weights_TK = self.router(x_TH, mask_T, x.shape[:-2].numel())
        else:
            topk_ids_TK, topk_weights_TK = replay(self.router, x_TH, routing, self.name or "this layer")

        def shared() -> Tensor | None:
            return None if self.shared_experts is None else self.shared_experts(x_TH)

        # Cast here, before the rows travel: bf16 halves the bytes on the wire. The router takes x as it came, since its
        # gate computes in fp32.
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        y_TH = run_experts(
            x_TH.to(dtype), topk_ids_TK, topk_weights_TK, self.dispatcher, self.experts, self.schedule, shared
        )
        return y_TH.reshape(x.shape)


def name_layers(model: nn.Module, tracker: ActivityTracker) -> None:
    """Tell the MoE layers of a model their names, and the tracker their order.

    Errors then name the layer, and a rank that skips a layer is noticed at the next exchange. Without it the skip shows
    only later, where a collective hangs or fails.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    for name, layer in layers.items():
        layer.name = name
    tracker.layers = tuple(layers)
