"""`ray up`: Ray's own launcher, for machines that are there and take ssh; it copies the token and runs our commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cluster.nodes.manifests.plan import ManifestPlan

TOKEN_FILE = "~/.trimtab/token"  # noqa: S105 a place, not a secret; `file_mounts` expands the tilde on both sides


def ray_up(plan: ManifestPlan, *, head: str, workers: Sequence[str], ssh_user: str) -> dict[str, Any]:
    """The cluster of a head and workers by their IPv4 addresses; `plan.num_nodes` is their number.

    `trimtab` must be in the PATH of a login shell there, and TOKEN_FILE be made here (`trimtab cluster token`).
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
        "auth": {"ssh_user": ssh_user},
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        # `ray up` replaces the ~ of an option that Ray reads, so it must reach it unquoted.
        "head_start_ray_commands": [again, " ".join(up)],
        "worker_start_ray_commands": [again, shlex.join(join).replace("RAY_HEAD_IP", "$RAY_HEAD_IP")],
    }
