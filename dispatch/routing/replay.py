"""Router replay: a forward by experts that are given, such as those that an inference engine chose (arXiv 2510.11370).

Shapes: T tokens on this rank (may be 0), H hidden, E experts, K top-k.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dispatch.diagnosis.activity_tracker import in_backward
from dispatch.errors import InvalidValue
from dispatch.routing.router import Router


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of each token in one MoE layer, for `MoELayer.forward` to route by instead of its router's choice.

    The router still weighs: the combine weights are those of its scores at these experts, so that the gate learns as
    usual. Nothing is counted: the forward changes no bias, statistic or auxiliary loss, and the bias is not used.

    Args:
        topk_ids_TK: int64 (T, K), global expert ids, K different ones for each token, padding included. On any device.
        topk_weights_TK: floating point (T, K), combine weights to use in place of the router's; the gate then gets no
            gradient, and these get one if they require it.

    Examples:
        Under torchrun the dispatcher is `make_dispatcher`'s; each rank gives the experts of its own tokens.

        >>> import torch
        >>> import torch.distributed as dist
        >>> from dispatch import MoEConfig, MoELayer, Routing, make_dispatcher
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dispatcher = make_dispatcher(num_experts=8, ep_group=dist.group.WORLD, hidden=32, top_k=2)
        >>> layer = MoELayer(32, MoEConfig(num_experts=8, top_k=2, ffn_hidden=64), dispatcher)
        >>> y = layer(torch.randn(3, 32), routing=Routing(torch.tensor([[0, 1], [6, 2], [5, 7]])))
        >>> layer.router.tokens_per_expert_E.sum()  # nothing is counted
        tensor(0)
        >>> dist.destroy_process_group()
    """

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor | None = None

    def check(self, shape: tuple[int, int], num_experts: int, place: str) -> None:
        """Refuse ids or weights that a layer cannot route by. The host waits for the device once.

        Args:
            shape: the (T, K) that the layer needs.
            place: the name of the layer, for errors.
        Raises:
            InvalidValue: a wrong shape or dtype, an id out of range, or one expert twice for a token.
        """
        ids_TK, weights_TK = self.topk_ids_TK, self.topk_weights_TK
        for name, tensor in (("topk_ids_TK", ids_TK), ("topk_weights_TK", weights_TK)):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InvalidValue(
                    f"{name} of the routing of {place} has shape {tuple(tensor.shape)}; it must be {shape}: the tokens "
                    "of this rank, padding included, by top_k; flatten sequences, and give each rank its own tokens"
                )
        if ids_TK.dtype != torch.int64:
            raise InvalidValue(
                f"topk_ids_TK of the routing of {place} is {ids_TK.dtype}; it must be torch.int64; call .long() on it"
            )
        if weights_TK is not None and not weights_TK.is_floating_point():
            raise InvalidValue(
                f"topk_weights_TK of the routing of {place} is {weights_TK.dtype}; it must be floating point, or None "
                "for the router's own weights"
            )
        _check_ids(ids_TK, num_experts, place)


def _check_ids(ids_TK: Tensor, num_experts: int, place: str) -> None:
    outside_T = ((ids_TK < 0) | (ids_TK >= num_experts)).any(1)
    twice_T = (ids_TK.sort(1).values.diff(dim=1) == 0).any(1)
    wrong_T = outside_T | twice_T
    if not bool(wrong_T.any()):
        return
    token = int(wrong_T.nonzero()[0])
    raise InvalidValue(
        f"token {token} of the routing of {place} has the experts {ids_TK[token].tolist()}; they must be different ids "
        f"from 0 to {num_experts - 1}; a token whose experts are not known, such as padding, takes any such ids"
    )


def replay(router: Router, x_TH: Tensor, routing: Routing, place: str) -> tuple[Tensor, Tensor]:
    """What `router` returns for these tokens, but for the experts that `routing` gives. Nothing is counted.

    place: the name of the layer, for errors. Raises InvalidValue, as `Routing.check`.
    """
    if not in_backward():  # a recompute has the routing that its forward has checked
        routing.check((len(x_TH), router.config.top_k), router.num_experts, place)
    topk_ids_TK, given_TK = routing.topk_ids_TK.to(x_TH.device), routing.topk_weights_TK
    if given_TK is not None:
        return topk_ids_TK, given_TK.to(x_TH.device, router.weight.dtype)
    with torch.autocast(x_TH.device.type, enabled=False):
        return topk_ids_TK, router.weigh(router.logits(x_TH), topk_ids_TK)


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Record which experts the MoE layers of `model` choose, as a `Routing` without weights for each call of a layer.

    The list is in the order of the calls; recomputes are left out. After one forward of a model whose layers run one
    after the other, it has a `Routing` for each MoE layer. A layer that replays chooses nothing and is not in it.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from dispatch import MoEConfig, MoELayer, make_dispatcher, recorded_routing
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> dispatcher = make_dispatcher(num_experts=8, ep_group=dist.group.WORLD, hidden=32, top_k=2)
        >>> layer = MoELayer(32, MoEConfig(num_experts=8, top_k=2, ffn_hidden=64), dispatcher)
        >>> x = torch.randn(3, 32)
        >>> with recorded_routing(layer) as routings:
        ...     y = layer(x)
        >>> torch.equal(layer(x, routing=routings[0]), y)
        True
        >>> dist.destroy_process_group()
    """
    routings: list[Routing] = []

    def record(_router: nn.Module, _inputs: object, routed: tuple[Tensor, Tensor]) -> None:
        if not in_backward():
            routings.append(Routing(routed[0]))

    hooks = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, Router)]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


def routing_by_block(routings: Sequence[Routing | None] | None, num_dense: int, num_moe: int) -> list[Routing | None]:
    """The routing, or None, of each block of a decoder; None for the dense blocks, which come first.

    Raises:
        InvalidValue: `routings` has not as many entries as there are MoE layers.
    """
    if routings is not None and len(routings) != num_moe:
        raise InvalidValue(
            f"routings has {len(routings)} entries; this forward calls {num_moe} MoE layers, so it must have {num_moe} "
            "in their order, None for a layer that chooses for itself"
        )
    return [None] * num_dense + list(routings or [None] * num_moe)
