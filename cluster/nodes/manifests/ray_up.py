"""`ray up`, Ray's own launcher, for machines that run already. It copies the token by ssh and runs our commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cluster.nodes.manifests.plan import ManifestPlan

TOKEN_FILE = "~/.trimtab/token"  # noqa: S105 a place, not a secret; `file_mounts` expands the tilde on both sides

# `ray up` of Ray 2.60 takes autoscaler v2, which starts no worker before the head is in its list of machines. For
# machines that are named by their addresses, only autoscaler v1 writes the head into that list.
AUTOSCALER_V1 = "RAY_enable_autoscaler_v2=0"


def ray_up(
    plan: ManifestPlan, *, head: str, workers: Sequence[str], ssh_user: str, ssh_key: str | None = None
) -> dict[str, Any]:
    """The configuration of `ray up` for a cluster of one head and workers. `plan.num_nodes` is their number.

    `trimtab` must be in the PATH of a login shell on these machines. On this machine TOKEN_FILE must exist (`trimtab
    cluster token` makes it).

    Args:
        head, workers: IPv4 addresses.
        ssh_key: file of the private key for all of these machines. `ray up` copies it to the head, which starts the
            workers. Without it the head must have a key of its own.
    """
    counts = ["--num-cpus", str(plan.cpus_per_node), "--num-gpus", str(plan.gpus_per_node)]
    up = ["trimtab", "cluster", "up", "--bind", head, *counts, "--", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
    join = ["trimtab", "cluster", "join", "RAY_HEAD_IP", *counts]
    down = "trimtab cluster down"  # ends the node that an earlier `ray up` started there, and nothing else
    return {
        "cluster_name": plan.name,
        "max_workers": len(workers),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
        "provider": {"type": "local", "head_ip": head, "worker_ips": list(workers)},
        "auth": {"ssh_user": ssh_user} | ({} if ssh_key is None else {"ssh_private_key": ssh_key}),
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        # Joined without quotes, so that the shell expands ~. `:` does nothing, but `ray up` warns that no node will
        # start unless it finds the words `ray start` in the command.
        "head_start_ray_commands": [down, f": runs ray start; {AUTOSCALER_V1} {' '.join(up)}"],
        "worker_start_ray_commands": [down, shlex.join(join).replace("RAY_HEAD_IP", "$RAY_HEAD_IP")],
    }
