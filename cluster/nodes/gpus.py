"""How many GPUs there are for the workers of a run."""

import torch

from cluster.config import ClusterConfig
from cluster.ray.access import check_access, find_access


def count_gpus(config: ClusterConfig) -> int:
    """The GPUs of this machine, or of all nodes that the cluster at `config.address` has now.

    Raises:
        ClusterUnreachable, TokenRefused, OpenCluster: as of `check_access`.
    """
    if config.address is None:
        return torch.cuda.device_count()
    from cluster.nodes.status import read_status

    access = find_access(config.address)
    check_access(access, allow_open=config.allow_without_token)
    return int(sum(node.total.get("GPU", 0.0) for node in read_status(access).nodes if node.alive))
