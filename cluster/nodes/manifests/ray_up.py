"""`ray up`: Ray's own launcher, for machines that are there and take ssh; it copies the token and runs our commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cluster.nodes.manifests.plan import ManifestPlan

TOKEN_FILE = "~/.trimtab/token"  # noqa: S105 a place, not a secret; `file_mounts` expands the tilde on both sides

# The second autoscaler, which `ray up` of Ray 2.60 asks for, starts no worker before it sees the head in its list of
# machines, and for machines with addresses of their own only the first one writes it there.
FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2=0"


def ray_up(
    plan: ManifestPlan, *, head: str, workers: Sequence[str], ssh_user: str, ssh_key: str | None = None
) -> dict[str, Any]:
    """The cluster of a head and workers by their IPv4 addresses; `plan.num_nodes` is their number.

    `trimtab` must be in the PATH of a login shell there, and TOKEN_FILE be made here (`trimtab cluster token`).

    Args:
        ssh_key: file of the private key that opens all of them. `ray up` copies it to the head, which itself starts the
            workers; without it the head must have a key of its own.
    """
    counts = ["--num-cpus", str(plan.cpus_per_node), "--num-gpus", str(plan.gpus_per_node)]
    up = ["trimtab", "cluster", "up", "--bind", head, *counts, "--", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
    join = ["trimtab", "cluster", "join", "RAY_HEAD_IP", *counts]
    again = "trimtab cluster down"  # ends only what an earlier `ray up` started
    return {
        "cluster_name": plan.name,
        "max_workers": len(workers),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
        "provider": {"type": "local", "head_ip": head, "worker_ips": list(workers)},
        "auth": {"ssh_user": ssh_user} | ({} if ssh_key is None else {"ssh_private_key": ssh_key}),
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        # The ~ must reach Ray unquoted. Without the words `ray start` in it `ray up` warns that no node will start.
        "head_start_ray_commands": [again, f": runs ray start; {FIRST_AUTOSCALER} {' '.join(up)}"],
        "worker_start_ray_commands": [again, shlex.join(join).replace("RAY_HEAD_IP", "$RAY_HEAD_IP")],
    }
