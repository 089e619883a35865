"""Tutel: its layer with the built-in gated expert; every expert's tokens are padded to those of the busiest expert.

No package index has Tutel: it races only if it was installed from its sources into .venv-peers. On CPU its dispatch
kernels take fp32 only. In a bf16 race rows are cast around these kernels; with an fp32 gate the layer does so itself.
"""

import torch
from torch import nn

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, gradient


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The layer without a limit on an expert's load."""
    layer = _moe_layer()(
        gate_type={"type": "top", "k": setting.shape.top_k, "fp32_gate": True, "capacity_factor": 0.0},
        model_dim=setting.shape.hidden,
        experts={
            "type": "llama_ffn",
            "num_experts_per_device": len(setting.expert_ids),
            "hidden_size_per_expert": setting.shape.ffn_hidden,
        },
        group=setting.ep_group,
    ).to(setting.dtype)
    mine, gate, experts = weights.of_experts(setting.expert_ids), layer.gates[0].wg, layer.experts
    gate.to(torch.float32).weight.data.copy_(mine.router_EH)
    for weight, value in ((experts.W_fc1, mine.gate_EFH), (experts.W_fc2, mine.up_EFH), (experts.W_fc3, mine.down_EHF)):
        weight.data.copy_(value.transpose(1, 2).flatten())  # it keeps (L, H, F) and (L, F, H) flat, to shard them
    return Contestant(layer, list(layer.parameters()), lambda: _read_grads(layer))


def _moe_layer() -> type[nn.Module]:
    try:
        from tutel.moe import moe_layer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "no package index has it; install it from its sources into this environment"
        ) from error
    return moe_layer


def _read_grads(layer: nn.Module) -> LayerWeights:
    experts = layer.experts
    gate, up, down = (
        gradient(getattr(experts, name)).view(getattr(experts, f"{name}_full_shape")).transpose(1, 2)
        for name in ("W_fc1", "W_fc2", "W_fc3")
    )
    return LayerWeights(gradient(layer.gates[0].wg.weight), gate, up, down)
