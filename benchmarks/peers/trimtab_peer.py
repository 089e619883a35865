"""Our layer."""

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, from_gate_up, gradient
from dispatch.config import MoEConfig
from dispatch.exchange.factory import make_dispatcher
from dispatch.layer import MoELayer


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
    layer.experts.gate_up_proj.data.copy_(mine.gate_up())
    layer.experts.down_proj.data.copy_(mine.down_EHF)
    return Contestant(layer, list(layer.parameters()), lambda: _read_grads(layer))


def _read_grads(layer: MoELayer) -> LayerWeights:
    experts = layer.experts
    return from_gate_up(gradient(layer.router.weight), gradient(experts.gate_up_proj), gradient(experts.down_proj))
