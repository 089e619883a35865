"""Our layer."""

from torch import Tensor

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, from_gate_up, gradient
from dispatch.all_to_all import make_dispatcher
from dispatch.experts import Experts
from dispatch.layer import MoEConfig, MoELayer


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The layer with the exchange that `make_dispatcher` chooses; its gate stays fp32 in bf16."""
    shape, mine = setting.shape, weights.of_experts(setting.expert_ids)
    config = MoEConfig(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        ffn_hidden=shape.ffn_hidden,
        num_shared_experts=0,
        score="softmax",
    )
    dispatcher = make_dispatcher(shape.num_experts, setting.ep_group, hidden=shape.hidden, top_k=shape.top_k)
    layer = MoELayer(shape.hidden, config, dispatcher).to(setting.dtype)
    layer.router.weight.data.copy_(mine.router_EH)
    for name, value in _expert_weights(layer.experts, mine).items():
        getattr(layer.experts, name).data.copy_(value)
    return Contestant(layer, list(layer.parameters()), lambda: _read_grads(layer))


def _has_fused_weight(experts: Experts) -> bool:
    # The experts may keep gate and up as two weights, or as one.
    return hasattr(experts, "gate_up_proj")


def _expert_weights(experts: Experts, mine: LayerWeights) -> dict[str, Tensor]:
    if _has_fused_weight(experts):
        return {"gate_up_proj": mine.gate_up(), "down_proj": mine.down_EHF}
    return {"gate_proj": mine.gate_EFH, "up_proj": mine.up_EFH, "down_proj": mine.down_EHF}


def _read_grads(layer: MoELayer) -> LayerWeights:
    experts, router = layer.experts, gradient(layer.router.weight)
    if _has_fused_weight(experts):
        return from_gate_up(router, gradient(experts.gate_up_proj), gradient(experts.down_proj))
    return LayerWeights(router, *(gradient(w) for w in (experts.gate_proj, experts.up_proj, experts.down_proj)))
