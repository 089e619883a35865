"""The layout of the ranks of a gang, and the process groups that they form."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Annotated, Literal, Self, cast, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store, _set_pg_timeout

from dispatch.config import ScheduleConfig
from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.errors import InvalidValue
from dispatch.exchange.node_groups import NodeGroups, make_node_groups
from dispatch.exchange.payload import Payload
from dispatch.exchange.registry import BACKENDS, Backend
from workers.distributed.connections import Connections, listening, refuse_strangers
from workers.distributed.context import Context
from workers.distributed.pipeline import PipelineConfig, PipelineGroups
from workers.distributed.replicas import ReplicaGroups, check_replicas, make_replica_groups, replica_counts

# NCCL's watchdog ends the process at the time-out of a group. It gets so much more time than collective_timeout_s, so
# that the driver first sees the hang and names the missing rank.
NCCL_MARGIN_S = 30.0

Shard = Literal["none", "optimizer", "full"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks divide the model."""

    ep_size: int = 0
    """Ranks that share one set of experts; must divide the number of workers, with a pipeline those of a stage. 0 takes
    all of them."""
    exchange: Annotated[str, BACKENDS] = "auto"
    """What travels: a row for each 'rank' that a token needs, for each 'assignment' of it, or for each 'node' and from
    there to its ranks; 'auto' takes what costs the wire least of these. 'deep_ep' leaves it to DeepEP's kernels, on
    NVIDIA GPUs with the package deep_ep, in run.dtype bfloat16."""
    payload: Payload = "compute"
    """How rows travel to their experts: as they are computed ('compute'), or coded in 8 bits ('fp8', inexact)."""
    ranks_per_node: int = 0
    """Neighbouring ranks that share a node, for the exchange 'node'; must divide ep_size. 0: as they are placed."""
    module: str | None = None
    """Python module that registers exchanges of your own; imported in every process, on every node."""
    shard: Shard = "none"
    """What ranks with the same parameters divide among them: nothing ('none'), the optimizer's moments and the master
    weights ('optimizer', ZeRO-1), or all states, gathering a block's weights when it computes ('full', ZeRO-3)."""
    context: int = 1
    """Neighbouring ranks that share each sequence, a run of its tokens each, and see the keys and values of all
    (context parallelism); 1: a rank has whole sequences. Must divide the number of workers."""
    replicate: int = 1
    """Groups of neighbouring ranks that each hold all sharded states once, and sum their gradients (HSDP); 1 shards
    over all ranks. Must divide the number of workers, and the ranks that hold the same experts."""
    expert_copies: int = 0
    """Copies of other ranks' hot experts that a rank holds in each layer, at most; 0 for none. The update stays exact;
    each copy costs an expert's weights and gradients, in memory and once a step on the wire."""
    copies_every: int = 10
    """Steps between placements of the copies, each by the loads of the steps since the one before."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The order of a layer's work: chunks, overlap, a bound on rows."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Stages of layers: pipeline parallelism."""

    def __post_init__(self) -> None:
        if self.ep_size < 0:
            raise InvalidValue(
                f"parallel.ep_size ({self.ep_size}) must be 0 (all workers) or a positive number of ranks"
            )
        BACKENDS.check(self.exchange, self.module)
        if self.payload not in get_args(Payload):
            raise InvalidValue(
                f"parallel.payload is {self.payload!r:.60}; it must be one of {', '.join(get_args(Payload))}"
            )
        if self.shard not in get_args(Shard):
            raise InvalidValue(f"parallel.shard is {self.shard!r:.60}; it must be one of {', '.join(get_args(Shard))}")
        if self.replicate < 1:
            raise InvalidValue(f"parallel.replicate ({self.replicate}) must be at least 1; 1 shards over all ranks")
        if self.replicate > 1 and self.shard == "none":
            raise InvalidValue(
                f"parallel.replicate ({self.replicate}) says how many groups of ranks hold all sharded states, but "
                "parallel.shard is 'none', with which every rank holds them whole; set --parallel.shard full, or leave "
                "parallel.replicate at 1"
            )
        if self.context < 1:
            raise InvalidValue(f"parallel.context ({self.context}) must be at least 1; 1 gives a rank whole sequences")
        self._check_copies()
        if self.ranks_per_node < 0:
            raise InvalidValue(
                f"parallel.ranks_per_node ({self.ranks_per_node}) must be 0 (as they are placed) or a positive number "
                "of ranks"
            )

    def _check_copies(self) -> None:
        if type(self.expert_copies) is not int or self.expert_copies < 0:
            raise InvalidValue(
                f"parallel.expert_copies ({self.expert_copies}) must be a whole number of copies a rank, 0 for none"
            )
        if type(self.copies_every) is not int or self.copies_every < 1:
            raise InvalidValue(f"parallel.copies_every ({self.copies_every}) must be a whole number of steps above 0")
        if self.expert_copies and self.shard != "none":
            raise InvalidValue(
                f"parallel.expert_copies ({self.expert_copies}) needs each expert whole on its owner, but "
                f"parallel.shard {self.shard} divides states; set --parallel.shard none, or --parallel.expert_copies 0"
            )
        if self.expert_copies and self.pipeline.size > 1:
            raise InvalidValue(
                f"parallel.expert_copies ({self.expert_copies}) is placed by ranks that have all layers, but "
                f"parallel.pipeline.size ({self.pipeline.size}) divides them; set one of them to its default"
            )
        if self.expert_copies and self.backend is not None:
            self.check_takes_copies(self.exchange)

    def check_takes_copies(self, exchange: str) -> None:
        """Raise InvalidValue where copies are wanted, but this exchange sends all rows of an expert to one rank."""
        if self.expert_copies and not BACKENDS[exchange].takes_copies:
            able = ", ".join(name for name, backend in BACKENDS.items() if backend.takes_copies)
            raise InvalidValue(
                f"parallel.expert_copies ({self.expert_copies}) is not for parallel.exchange {exchange}, which sends "
                f"all rows of an expert to one rank; choose --parallel.exchange {able}, or --parallel.expert_copies 0"
            )

    def resized_to(self, world_size: int) -> Self:
        """These settings for a gang of another size than they were made for; unchanged where they fit.

        Otherwise EP size, number of replicas and context-parallel size become the largest numbers that fit and are not
        above those of the settings; ranks_per_node and an exchange by nodes are dropped where they no longer fit.
        """
        num_ranks = self.pipeline.ranks_per_stage(world_size)
        wanted = min(self.ep_size or num_ranks, num_ranks)
        ep_size = max(size for size in range(1, wanted + 1) if num_ranks % size == 0)
        changed = self if ep_size == (self.ep_size or num_ranks) else replace(self, ep_size=ep_size)
        replicas = max(num for num in replica_counts(num_ranks, ep_size) if num <= self.replicate)
        changed = changed if replicas == self.replicate else replace(changed, replicate=replicas)
        context = max(size for size in range(1, self.context + 1) if num_ranks % size == 0)
        changed = changed if context == self.context else replace(changed, context=context)
        if not self.ranks_per_node or ep_size % self.ranks_per_node == 0:
            return changed
        exchange = "auto" if self.backend is not None and self.backend.needs_nodes else self.exchange
        return replace(changed, ranks_per_node=0, exchange=exchange)

    @property
    def backend(self) -> Backend | None:
        """The registered exchange; None for `auto`."""
        return None if self.exchange == "auto" else BACKENDS.find(self.exchange, self.module)

    def ep_size_of(self, world_size: int) -> int:
        """The EP size of a gang of this size, which may differ from the size that the settings were made for."""
        return self.resized_to(world_size).resolve(world_size)

    def resolve(self, world_size: int) -> int:
        """The EP size for so many ranks. Raises InvalidValue unless all of these settings fit that number of ranks."""
        num_ranks = self.pipeline.ranks_per_stage(world_size)
        ep_size = self.ep_size or num_ranks
        if num_ranks % ep_size:
            scope = " of a pipeline stage" if self.pipeline.size > 1 else ""
            raise InvalidValue(
                f"parallel.ep_size ({ep_size}) must divide the number of workers{scope} ({num_ranks}); "
                f"use one of {[size for size in range(1, num_ranks + 1) if num_ranks % size == 0]}"
            )
        if self.ranks_per_node and ep_size % self.ranks_per_node:
            raise InvalidValue(
                f"parallel.ranks_per_node ({self.ranks_per_node}) must divide parallel.ep_size ({ep_size}), so that "
                "all nodes of an expert-parallel group have equally many ranks"
            )
        check_replicas(self.replicate, num_ranks, ep_size)
        if num_ranks % self.context:
            raise InvalidValue(
                f"parallel.context ({self.context}) must divide the number of workers ({num_ranks}); use one of "
                f"{[size for size in range(1, num_ranks + 1) if num_ranks % size == 0]}"
            )
        return ep_size


@dataclass(frozen=True, kw_only=True)
class RankGroups:
    """One rank's place and its process groups.

    world_group and ep_group carry tokens and gradients on the device's backend. edp_group holds the ranks with the same
    expert shard. control_group is gloo over all ranks, also on GPU machines: its small messages take CPU tensors and
    never queue behind token traffic. checkpoint_group and memory_group are like it, one for each thread that makes
    collectives beside the training, since collectives of one group must have the same order on all ranks. nodes: the
    groups of the exchange `node`, if the run has it. replicas: the meshes of sharded states, where these are
    replicated. pipeline: this rank's place in a pipeline, if there is one; the EP and EDP groups are then inside a
    stage. context: this rank's place among the ranks that share its sequences, if any do. connections: those of the
    gloo groups. tracker: where the training thread notes what it is doing, and starts its collectives.
    """

    rank: int
    world_size: int
    ep_rank: int
    ep_size: int
    edp_rank: int
    edp_size: int
    device: torch.device
    world_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    memory_group: dist.ProcessGroup
    nodes: NodeGroups | None = None
    replicas: ReplicaGroups | None = None
    pipeline: PipelineGroups | None = None
    context: Context | None = None
    connections: Connections = field(default_factory=Connections)
    tracker: ActivityTracker = field(default_factory=ActivityTracker)

    @property
    def stage_group(self) -> dist.ProcessGroup:
        """The ranks with the same layers, which divide the batch among them: all of them without a pipeline."""
        return self.world_group if self.pipeline is None else self.pipeline.stage_group

    @property
    def dp_size(self) -> int:
        """The number of ranks in `stage_group`."""
        return self.world_size if self.pipeline is None else self.world_size // self.pipeline.size

    @property
    def num_shares(self) -> int:
        """Into how many shares a batch is divided: one for each rank of a stage, or for each context-parallel group."""
        return self.dp_size // (self.context.size if self.context else 1)

    @property
    def share(self) -> int:
        """Which share of a batch this rank computes, from 0."""
        return self.rank % self.dp_size // (self.context.size if self.context else 1)


def join_groups(
    *,
    rank: int,
    world_size: int,
    store: Store,
    config: ParallelConfig,
    device: torch.device,
    timeout_s: float,
    ranks_per_node: int = 0,
) -> RankGroups:
    """Form all process groups of a rank, and use each once.

    EP is the inner dimension of the mesh (pp, edp, ep), so that neighbouring ranks, which share a node where they fit,
    exchange tokens. The stages of a pipeline, which send least, are the outer one.

    Args:
        ranks_per_node: size of the node groups of the exchange `node`; 0 forms none.

    Raises:
        StrangerConnected: on all ranks, where a process that is no rank is connected to a group.

    Collective: all ranks must call it, and it fails within `timeout_s` if one does not.
    """
    on_cuda = device.type == "cuda"
    timeout = timedelta(seconds=timeout_s + NCCL_MARGIN_S * on_cuda)
    control_timeout = timedelta(seconds=timeout_s)
    before = listening()
    _form_default_group(rank, world_size, store, device, timeout)
    ep_size = config.resolve(world_size)
    pp_size, edp_size = config.pipeline.size, world_size // config.pipeline.size // ep_size
    stage_dim = {"pp": pp_size} if pp_size > 1 else {}
    mesh = _mesh(device, stage_dim | {"edp": edp_size, "ep": ep_size}, timeout)
    replicas = make_replica_groups(config.replicate, world_size, ep_size, device.type, pp_size)
    _set_timeouts(replicas.groups if replicas else [], timeout)
    tracker = ActivityTracker()
    context = _join_context(config.context, world_size, device, timeout, tracker) if config.context > 1 else None
    nodes = make_node_groups(mesh.get_group("ep"), ranks_per_node, timeout) if ranks_per_node else None
    # NCCL's connections do not follow gloo's rules, so on CUDA only the gloo groups formed below are checked.
    before_gloo = listening() if on_cuda else before
    groups = RankGroups(
        rank=rank,
        world_size=world_size,
        ep_rank=mesh.get_local_rank("ep"),
        ep_size=ep_size,
        edp_rank=mesh.get_local_rank("edp"),
        edp_size=edp_size,
        device=device,
        world_group=cast(dist.ProcessGroup, dist.group.WORLD),
        ep_group=mesh.get_group("ep"),
        edp_group=mesh.get_group("edp"),
        control_group=dist.new_group(backend="gloo", timeout=control_timeout),
        nodes=nodes,
        replicas=replicas,
        pipeline=_pipeline_groups(mesh, timeout) if pp_size > 1 else None,
        context=context,
        tracker=tracker,
        checkpoint_group=dist.new_group(backend="gloo", timeout=control_timeout),
        memory_group=dist.new_group(backend="gloo", timeout=control_timeout),
    )
    refuse_strangers(before_gloo, store, rank, world_size)  # before any group is used
    _use_each(groups)
    return replace(groups, connections=Connections.formed_since(before, groups.control_group))


def _mesh(device: torch.device, sizes: dict[str, int], timeout: timedelta) -> DeviceMesh:
    """Form a mesh of all ranks, whose dimensions have these names and sizes. Collective."""
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    _set_timeouts(mesh.get_all_groups(), timeout)
    return mesh


def _set_timeouts(groups: Iterable[dist.ProcessGroup], timeout: timedelta) -> None:
    for group in groups:
        _set_pg_timeout(timeout, group)  # a mesh gives its groups torch's default, half an hour


def _pipeline_groups(mesh: DeviceMesh, timeout: timedelta) -> PipelineGroups:
    stage_group, _ = dist.new_subgroups(group_size=mesh.size(1) * mesh.size(2), timeout=timeout)
    if stage_group is None:
        raise RuntimeError("torch.distributed has formed no group of this rank's stage")
    return PipelineGroups(mesh.get_local_rank("pp"), mesh.size(0), mesh.get_group("pp"), stage_group)


def _join_context(
    size: int, world_size: int, device: torch.device, timeout: timedelta, tracker: ActivityTracker
) -> Context:
    """Form the groups of `size` neighbouring ranks that share their sequences. Collective over all ranks."""
    mesh = _mesh(device, {"share": world_size // size, "context": size}, timeout)
    return Context(mesh.get_local_rank("context"), size, mesh.get_group("context"), tracker)


def _form_default_group(rank: int, world_size: int, store: Store, device: torch.device, timeout: timedelta) -> None:
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_cuda else None,
    )


def local_device(choice: str) -> torch.device:
    """The device of this rank: `choice` is auto, cpu or cuda. It decides the backend: CUDA → NCCL, CPU → gloo.

    An actor sees the devices that Ray gave it, so 0 is its first.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise InvalidValue(
            "device is 'cuda', but torch sees no CUDA device here; use --device cpu or install a CUDA torch"
        )
    use_cuda = choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
    return torch.device("cuda", 0) if use_cuda else torch.device("cpu")


def _use_each(groups: RankGroups) -> None:
    # torch makes communicators at their first use: they are made here, so that a wrong network fails at the start and
    # not in a step.
    device_groups = [groups.world_group, groups.ep_group, groups.edp_group]
    device_groups += [groups.nodes.network_group, groups.nodes.local_group] if groups.nodes else []
    device_groups += groups.replicas.groups if groups.replicas else []
    device_groups += [groups.pipeline.group, groups.pipeline.stage_group] if groups.pipeline else []
    device_groups += [groups.context.group] if groups.context else []
    cpu_groups = [groups.control_group, groups.checkpoint_group, groups.memory_group]
    placed = [(group, groups.device) for group in device_groups]
    for group, device in [*placed, *((group, torch.device("cpu")) for group in cpu_groups)]:
        size = dist.get_world_size(group)
        ones = torch.ones(size, device=device)
        dist.all_reduce(ones, group=group)
        received = torch.empty_like(ones)
        dist.all_to_all_single(received, ones, group=group)
        if not bool((received == size).all()):
            raise RuntimeError(f"rank {groups.rank}: a process group of {size} ranks returned {received.tolist()}")
