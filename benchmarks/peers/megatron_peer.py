"""Megatron-Core: MoELayer with SequentialMLP experts and the alltoall dispatcher, through a shim for CPU.

Its fused activation, permutation and grouped matmul are CUDA or Transformer Engine code and are off here.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting, from_gate_up, gradient, stacked_gradient


def build(setting: Setting, weights: LayerWeights) -> Contestant:
    """The layer of Megatron's own specification for builds without Transformer Engine."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mine = weights.of_experts(setting.expert_ids)
    spec = get_moe_module_spec(use_te=False, num_experts=setting.shape.num_experts, moe_grouped_gemm=False)
    with _cpu_for_cuda():
        layer = MoELayer(_config(setting), spec.submodules, pg_collection=_groups(setting))
    layer.router.weight.data = mine.router_EH.clone()
    for expert, gate_up, down in zip(layer.experts.local_experts, mine.gate_up(), mine.down_EHF, strict=True):
        expert.linear_fc1.weight.data.copy_(gate_up)
        expert.linear_fc2.weight.data.copy_(down)
    return _CpuContestant(
        lambda x_TH: layer(x_TH[:, None])[0][:, 0], list(layer.parameters()), lambda: _read_grads(layer)
    )


class _CpuContestant(Contestant):
    """A contestant whose steps run with torch.cuda patched; the steps of other contestants must not."""

    def step(self, x_TH: Tensor, grad_output_TH: Tensor) -> Tensor:
        with _cpu_for_cuda():
            return super().step(x_TH, grad_output_TH)


@contextlib.contextmanager
def _cpu_for_cuda() -> Iterator[None]:
    """Replace what Megatron calls of torch.cuda without asking for a GPU first, and a name that it never imports.

    Its split sizes become host integers when they are copied from a GPU; `_with_host_splits` does so here.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    patches = {"current_device": lambda: "cpu", "Stream": mock.MagicMock, "stream": contextlib.nullcontext}
    patches["current_stream"] = lambda: token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        stack.enter_context(mock.patch.object(token_dispatcher, "all_to_all", _with_host_splits(mappings.all_to_all)))
        yield


def _with_host_splits(all_to_all):
    # On CPU split sizes stay tensors, which gloo refuses.
    def call(
        group: dist.ProcessGroup, rows: Tensor, output_splits: Tensor | None, input_splits: Tensor | None
    ) -> Tensor:
        splits = [None if sizes is None else sizes.tolist() for sizes in (output_splits, input_splits)]
        return all_to_all(group, rows, *splits)

    return call


def _config(setting: Setting):
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = setting.shape
    return TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn_hidden,
        moe_ffn_hidden_size=shape.ffn_hidden,
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - no password
        expert_model_parallel_size=setting.ep_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=setting.dtype,
        bf16=setting.dtype == torch.bfloat16,
    )


def _groups(setting: Setting):
    """The EP group, and this rank alone for all other kinds of parallelism."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone = [dist.new_group([rank]) for rank in range(setting.ep_size)][setting.ep_rank]
    solo = dict.fromkeys(("tp", "cp", "expt_tp", "expt_dp", "tp_cp", "tp_dp_cp"), alone)
    return ProcessGroupCollection(ep=setting.ep_group, tp_ep=setting.ep_group, **solo)


def _read_grads(layer: nn.Module) -> LayerWeights:
    experts = layer.experts.local_experts
    gate_up = stacked_gradient([expert.linear_fc1.weight for expert in experts])
    down = stacked_gradient([expert.linear_fc2.weight for expert in experts])
    return from_gate_up(gradient(layer.router.weight), gate_up, down)
