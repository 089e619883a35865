"""Every registered exchange between CPU ranks by name, as kind(num_experts, group): what all must be able to do."""

import functools

import torch.distributed as dist

from dispatch.diagnosis.meter import Meter
from dispatch.errors import InvalidValue
from dispatch.exchange.buffer_pool import BufferPool
from dispatch.exchange.node_groups import make_node_groups
from dispatch.exchange.registry import BACKENDS, BackendContext, ExchangeShape

SHAPE = ExchangeShape(num_experts=8, ep_size=2, hidden=16, top_k=2, device="cpu", dtype="float32")


def _make(name, ranks_per_node, num_experts, group):
    """ranks_per_node: one node of all ranks where it does not divide them; 0 for an exchange without nodes."""
    size = dist.get_world_size(group)
    nodes = make_node_groups(group, ranks_per_node if size % ranks_per_node == 0 else size) if ranks_per_node else None
    shape = ExchangeShape(num_experts=num_experts, ep_size=size, hidden=16, top_k=2)
    return BACKENDS[name].build(
        BackendContext(shape=shape, ep_group=group, nodes=nodes, meter=Meter(), buffer_pool=BufferPool())
    )


def _works_here(backend):
    try:
        backend.check(SHAPE)
    except InvalidValue:
        return False
    return True


KINDS = {
    name if not size else f"{name}, {size} a node": functools.partial(_make, name, size)
    for name, backend in BACKENDS.items()
    if _works_here(backend)
    for size in ((1, 2) if backend.needs_nodes else (0,))
}
