"""Gradients of the global batch on every rank: summed, measured and clipped as one process would.

Dense parameters are replicated over the world, with a pipeline over the ranks of their stage. The experts of a rank are
replicated over `edp_group` only (`workers.distributed.parallel`). Where these ranks shard the parameters
(`workers.training.sharding`), FSDP sums the gradients itself, in backward.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispatch.diagnosis.activity_tracker import ActivityTracker
from dispatch.experts.stacked import expert_parameters
from workers.distributed.parallel import RankGroups
from workers.distributed.sharded import is_sharded, local_rows

# Large enough to use the bandwidth of a link, and small beside a model: reducing takes the memory of one bucket more.
BUCKET_BYTES = 64 * 2**20

# The last stage of a pipeline may hold this parameter as well as the first one.
SHARED_EMBEDDING = "token_embedding.weight"


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters in module order: (dense, experts). Ranks that hold the same ones agree on the order."""
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trainable if id(p) not in experts], [p for p in trainable if id(p) in experts]


def reduce_gradients(model: nn.Module, groups: RankGroups) -> None:
    """Sum every gradient over the ranks that hold the parameter, where FSDP has not done so.

    A sum, never a mean: `Trainer._accumulate` and `Pipeline` divide the loss by the targets of the global batch, so
    that the sum is the gradient of one process on that batch. A missing gradient becomes a tensor of zeros: all ranks
    then send the same buckets, and the optimizer treats a parameter alike on all of them. Gradients become views of
    their bucket.

    Collective: every rank must call it once per step, after the last backward pass.
    """
    dense, experts = split_parameters(model)
    for parameters, group, size in (
        (dense, groups.stage_group, groups.dp_size),
        (experts, groups.edp_group, groups.edp_size),
    ):
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if size > 1:
            for bucket in _buckets([parameter for parameter in parameters if not is_sharded(parameter)]):
                _sum_bucket(bucket, group, groups.tracker)


def global_grad_norm(model: nn.Module, groups: RankGroups) -> float:
    """The 2-norm of the gradient of the whole model, as one process would see it, computed in float64.

    Each element of the model counts once, however many ranks hold it. All ranks get the same bits; inf or NaN as soon
    as any gradient of any rank is not finite. Call it after `reduce_gradients`.

    Collective over all ranks where parameters are sharded, else over the EP group and the pipeline. Waits for the
    device once.
    """
    dense, experts = split_parameters(model)
    if groups.pipeline is not None and groups.pipeline.rank > 0:  # the first stage counts the shared embedding
        shared = dict(model.named_parameters()).get(SHARED_EMBEDDING)
        dense = [parameter for parameter in dense if parameter is not shared]
    dense_sum, expert_sum = _sum_of_squares(dense, groups.device), _sum_of_squares(experts, groups.device)
    # Frozen parameters are looked at too: all ranks must take the same branch, and other stages may freeze other parts.
    if any(map(is_sharded, model.parameters())):
        # Each replica holds all rows once, so the sum over all ranks counts a row once for each replica; an expert with
        # one holder counts once. Summed over the world and not over one replica: all ranks must get the same bits, and
        # two replicas may add in different orders.
        num_replicas = groups.replicas.num_replicas if groups.replicas else 1
        total = dense_sum / num_replicas + expert_sum / min(num_replicas, groups.edp_size)
        groups.tracker.run(dist.all_reduce, total, group=groups.world_group)
        return float(total.sqrt())
    if groups.ep_size > 1:
        groups.tracker.run(dist.all_reduce, expert_sum, group=groups.ep_group)
    total = dense_sum + expert_sum
    if groups.pipeline is not None:
        groups.tracker.run(dist.all_reduce, total, group=groups.pipeline.group)
    return float(total.sqrt())


def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where norm exceeds max_norm. max_norm 0 turns it off.

    norm: from `global_grad_norm`. If it is not finite, nothing is changed: the caller skips the step.
    """
    if 0 < max_norm < norm < math.inf:
        torch._foreach_mul_(_gradients(model.parameters()), max_norm / norm)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, of up to BUCKET_BYTES; a larger parameter is alone in its bucket."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size + parameter.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def _sum_bucket(bucket: Sequence[nn.Parameter], group: dist.ProcessGroup, tracker: ActivityTracker) -> None:
    flat = torch.cat([gradient.flatten() for gradient in _gradients(bucket)])
    tracker.run(dist.all_reduce, flat, group=group)
    for parameter, summed in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
        parameter.grad = summed.view_as(parameter)


def _sum_of_squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    # float64 throughout: squares of fp32 overflow from 1.8e19 on, and a finite gradient must not look infinite.
    # One call for all: 2.1 ms where a vector_norm with this dtype for each takes 4.8 (2.8M elements, one CPU thread).
    norms = torch._foreach_norm(gradients, 2, torch.float64)  # noqa: SLF001 - torch has no public name for it
    return torch.stack(norms).square().sum()


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's rows of each gradient; parameters without one are left out."""
    return [local_rows(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]
