"""torchtitan: its MoE with its all-to-all token dispatcher, on the `partial_dtensor` backend.

Two changes are made, without which it would compute something else on CPU than on GPUs, or than the others here. Its
experts cast everything to bf16: in an fp32 race they compute in the dtype of their parameters instead. Its gate is
meant to be fp32, by an autocast that CPUs refuse with a warning: here the gate casts by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, gradient, parameter


class Float32Gate(nn.Module):
    """A linear gate in fp32, whatever the dtype of the tokens."""

    def __init__(self, router_EH: Tensor) -> None:
        super().__init__()
        self.weight = parameter(router_EH, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., E)."""
        return F.linear(x.float(), self.weight)


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The layer that torchtitan's configuration builds, with this rank's experts in it."""
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")  # `spmd_types`, the default, needs a mesh of a whole trainer
    mine = weights.of_experts(setting.expert_ids)
    layer = _config(setting).build()
    layer.router.gate = Float32Gate(mine.router_EH)
    experts = layer.routed_experts.inner_experts
    for name, value in (("w1_EFD", mine.gate_EFH), ("w3_EFD", mine.up_EFH), ("w2_EDF", mine.down_EHF)):
        setattr(experts, name, parameter(value, setting.dtype))
    if setting.dtype == torch.float32:
        _compute_in_parameter_dtype(experts)
    if setting.ep_size > 1:
        _connect(layer.routed_experts.token_dispatcher, setting)
    return Contestant(lambda x_TH: layer(x_TH[None])[0], list(layer.parameters()), lambda: _read_grads(layer))


def _config(setting: Setting):
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    shape = setting.shape
    experts = GroupedExperts.Config(dim=shape.hidden, hidden_dim=shape.ffn_hidden, num_experts=len(setting.expert_ids))
    dispatcher = AllToAllTokenDispatcher.Config(num_experts=shape.num_experts, top_k=shape.top_k)
    router = TokenChoiceTopKRouter.Config(
        num_experts=shape.num_experts,
        gate=Linear.Config(in_features=shape.hidden, out_features=shape.num_experts),
        top_k=shape.top_k,
        score_func="softmax",
        route_norm=True,
    )
    return MoE.Config(
        num_experts=shape.num_experts,
        routed_experts=RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
        router=router,
        load_balance_coeff=None,
    )


def _connect(dispatcher, setting: Setting) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (setting.ep_size,), mesh_dim_names=("ep",)))


def _compute_in_parameter_dtype(experts: nn.Module) -> None:
    """Replace the experts' forward by one with the same grouped matmuls, but without the casts to bf16."""

    def forward(x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        offsets_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        gate, up, down = (w.transpose(-2, -1) for w in (experts.w1_EFD, experts.w3_EFD, experts.w2_EDF))
        inner = F.silu(F.grouped_mm(x_RD, gate, offs=offsets_E)) * F.grouped_mm(x_RD, up, offs=offsets_E)
        return F.grouped_mm(inner, down, offs=offsets_E)

    experts.forward = forward


def _read_grads(layer: nn.Module) -> LayerWeights:
    experts = layer.routed_experts.inner_experts
    weights = (layer.router.gate.weight, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF)
    return LayerWeights(*(gradient(weight) for weight in weights))
