"""How many GPUs there are for the workers of a run."""

from cluster.config import ClusterConfig
from cluster.ray.access import check_access, find_access


def count_gpus(config: ClusterConfig) -> int:
    """Count the GPUs of all living nodes of the cluster at `config.address`.

    Raises:
        ClusterUnreachable, TokenRefused, OpenCluster: see `check_access`.
    """
    from cluster.nodes.status import read_status

    access = find_access(config.address or "auto")
    check_access(access, allow_open=config.allow_without_token)
    return int(sum(node.total.get("GPU", 0.0) for node in read_status(access).nodes if node.alive))
