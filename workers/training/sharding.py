"""Shards parameters, gradients and moments by torch's fully_shard (FSDP2), over ranks that would hold equal copies.

- Dense parameters are sharded over all ranks; in a pipeline, over the ranks of a stage.
- The routed experts of a layer are sharded over `edp_group` (expert-data parallelism), by whole experts.
- With `parallel.replicate` both are sharded inside one replica, and replicas add their gradients (HSDP).

Blocks are gathered one by one; embedding, last norm and head, which the root holds, stay gathered from forward to
backward. Gradients are sums here as everywhere (`workers.training.gradients`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dispatch.experts.stacked import Experts, expert_parameters
from workers.distributed.parallel import RankGroups, Shard
from workers.model.decoder import Decoder
from workers.model.lora import gathers_experts_narrow
from workers.training.narrow_gather import gather_narrow


def shard_states(model: Decoder, groups: RankGroups, shard: Shard, dtype: str = "float32") -> None:
    """Replace the parameters of `model` by DTensors of this rank's rows. On the meta device, nothing is allocated.

    dtype: `run.dtype`. Parameters that one rank alone holds stay as they are.

    Collective over the world: all ranks must call it.
    """
    if shard == "none" or groups.dp_size == 1:
        return
    dense_mesh, expert_mesh = _meshes(groups)
    options: dict[str, Any] = {
        "mesh": dense_mesh,
        "reshard_after_forward": shard == "full",
        # Where one rank of each replica holds an expert there is nothing to shard: FSDP would only copy it at each use.
        "ignored_params": set(expert_parameters(model).values()) if expert_mesh is None else None,
    }
    if expert_mesh is not None:
        narrow = torch.bfloat16 if gathers_experts_narrow(dtype, model.config.lora) else None
        # Reduced in fp32: in bfloat16 a sum over ranks would round away small contributions.
        policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
        # Before the blocks: fully_shard leaves parameters of nested units to these.
        for experts in (module for module in model.modules() if isinstance(module, Experts)):
            fully_shard(experts, mesh=expert_mesh, reshard_after_forward=shard == "full", mp_policy=policy)
    units = [*model.layers, *_mtp(model)]
    for unit in units:
        fully_shard(unit, **options)
    # Backward begins with the root's parameters (head, last norm): resharded after forward, they would be gathered
    # again at once.
    fully_shard(model, **{**options, "reshard_after_forward": False})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums and not means, as in `reduce_gradients`. Without the second call torch would reduce by PREMUL_SUM,
            # also for a factor of 1, which only NCCL has.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if dtype == "bfloat16":
        for unit in (*units, model):
            gather_narrow(unit, dense_mesh.size(dense_mesh.ndim - 1))
    _prefetch(model)
    register_fsdp_forward_method(model, "run_layers")  # stages of a pipeline call it in place of `forward`


def _meshes(groups: RankGroups) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The meshes of dense parameters and of experts; None for experts that have one holder in each replica."""
    if (replicas := groups.replicas) is not None:
        is_shared = groups.edp_size > replicas.num_replicas
        return _with_group_names(replicas.dense), _with_group_names(replicas.experts) if is_shared else None
    dense = DeviceMesh.from_group(groups.stage_group, groups.device.type, mesh_dim_names=("dense",))
    if groups.edp_size == 1:
        return _with_group_names(dense), None
    experts = DeviceMesh.from_group(groups.edp_group, groups.device.type, mesh_dim_names=("edp",))
    return _with_group_names(dense), _with_group_names(experts)


def _with_group_names(mesh: DeviceMesh) -> DeviceMesh:
    """The same mesh with the names of its process groups in the names of its dimensions.

    torch caches the result of an operation on DTensors, and with it their mesh, for the next operation on an equal
    mesh. Meshes are equal if their ranks and the names of their dimensions are. Without other names a process that
    joins a second gang could get a mesh of the first one, whose groups no longer exist.
    """
    groups = mesh.get_all_groups()
    names = tuple(f"{name} {group.group_name}" for name, group in zip(mesh.mesh_dim_names or (), groups, strict=True))
    return DeviceMesh.from_group(groups, mesh.device_type, mesh.mesh.contiguous(), mesh_dim_names=names)


def set_sync(model: nn.Module, shard: Shard, *, is_last: bool) -> None:
    """Tell FSDP before a backward pass what to communicate in it. is_last: this is the step's last micro-batch.

    With shard `optimizer` weights are gathered and gradients reduced once a step, in the last backward pass; with
    `full` in each. In both, replicas add their sums in the last one.
    """
    if not isinstance(model, FSDPModule):
        return
    if shard == "optimizer":
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)
    else:
        model.set_requires_all_reduce(is_last)


def set_sync_of_stage(model: Decoder, layers: range, shard: Shard, *, is_last: bool, is_last_of_rank: bool) -> None:
    """As `set_sync`, before a backward pass through some layers of a pipeline.

    is_last: for these layers; is_last_of_rank: for all layers of this rank. The root's parameters (embedding, last
    norm, head) stay gathered until the rank's last backward pass, and are reduced in it: other micro-batches are
    between their forward and their backward, and still need them.
    """
    units = [model.layers.get_submodule(str(index)) for index in layers]
    for unit in [*units, *(_mtp(model) if layers.stop == model.config.num_layers else [])]:
        set_sync(unit, shard, is_last=is_last)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last_of_rank, recurse=False)
        model.set_reshard_after_backward(is_last_of_rank, recurse=False)


def _consecutive_blocks(model: Decoder) -> Iterator[list[nn.Module]]:
    """The consecutive blocks of each stage that this rank holds; without a pipeline one run of all blocks."""
    run: list[nn.Module] = []
    last = -1
    for name, block in model.layers.named_children():
        if run and int(name) != last + 1:
            yield run
            run = []
        run.append(block)
        last = int(name)
    yield [*run, *_mtp(model)]


def _mtp(model: Decoder) -> list[nn.Module]:
    """The layer for multi-token prediction, where this rank has one."""
    return [module for name, module in model.named_children() if name == "mtp"]


def _prefetch(model: Decoder) -> None:
    """Tell each unit which other units to gather while it computes.

    By default FSDP prefetches in backward by the order of the last forward, which in a pipeline was that of another
    micro-batch. A unit whose prefetch list names only itself prefetches nothing.
    """
    runs, root = (
        list(_consecutive_blocks(model)),
        next(each for each in model.modules() if isinstance(each, FSDPModule)),
    )
    for units in runs:
        _prefetch_in(units)
    last: list[FSDPModule] = [unit for unit in runs[0][-1:] if isinstance(unit, FSDPModule)]
    root.set_modules_to_backward_prefetch(last if len(runs) == 1 else [root])


def _prefetch_in(units: list[nn.Module]) -> None:
    # For each block: itself, and its experts where these are a unit of their own.
    order = [[each for each in unit.modules() if isinstance(each, FSDPModule)] for unit in units]
    for index, (unit, *experts) in enumerate(order):
        unit.set_modules_to_forward_prefetch([*experts, *(order[index + 1][:1] if index + 1 < len(order) else [])])
        unit.set_modules_to_backward_prefetch([*experts, *(order[index - 1][:1] if index else [])] or [unit])
        for each in experts:
            each.set_modules_to_backward_prefetch([each])
