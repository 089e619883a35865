"""Hugging Face transformers: the Qwen3-MoE block with `grouped_mm` experts, over ranks by its own `all_to_all`.

The block's router computes in the dtype of the activations, so in a bf16 race its gate is bf16.
"""

from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, from_gate_up, gradient


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The block as it is in a model with this configuration."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    block = Qwen3MoeSparseMoeBlock(_config(setting)).to(setting.dtype)
    block.gate.weight.data.copy_(weights.router_EH)
    block.experts.gate_up_proj.data.copy_(weights.gate_up())
    block.experts.down_proj.data.copy_(weights.down_EHF)
    if setting.ep_size > 1:
        _spread_experts(block, setting)
    return Contestant(lambda x_TH: block(x_TH[None])[0], list(block.parameters()), lambda: _read_grads(block))


def _config(setting: Setting):
    from transformers import Qwen3MoeConfig

    shape = setting.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.ffn_hidden,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"  # noqa: SLF001 - set so by from_pretrained, which loads a whole model
    return config


def _spread_experts(block: nn.Module, setting: Setting) -> None:
    """Apply the model's expert-parallel plan to the one block."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    mesh = init_device_mesh("cpu", (setting.ep_size, 1), mesh_dim_names=("ep", "tp"))
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_dispatch_experts",
    }
    apply_expert_parallelism(block, mesh["ep"], mesh["tp"], plan, ep_implementation="all_to_all")


def _read_grads(block: nn.Module) -> LayerWeights:
    gate_up, down = (_local(gradient(w)) for w in (block.experts.gate_up_proj, block.experts.down_proj))
    return from_gate_up(gradient(block.gate.weight), gate_up, down)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard where the plan has made a DTensor of the weight."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
