"""Slurm: a batch script that starts Ray on all nodes of the allocation, trains, and ends it (`ray symmetric-run`)."""

from __future__ import annotations

import shlex

from cluster.nodes.manifests.plan import ManifestPlan
from cluster.nodes.node import NODE_DEFAULTS
from cluster.ray.local_ray import OBJECT_STORE_BYTES

NODE_WAIT_S = 300  # Ray's 30 s are too short where a file system answers slowly.


def slurm_script(plan: ManifestPlan, *, time_limit: str) -> str:
    """The script. `time_limit` as Slurm writes it: [DAYS-]HOURS:MINUTES:SECONDS.

    The token is one of this job, in the user's home, which the nodes share. `ray symmetric-run` ends with `ray stop`,
    which ends all Ray processes of the user on a node: hence --exclusive.
    """
    ray = ["--min-nodes", str(plan.num_nodes), "--num-cpus", str(plan.cpus_per_node)]
    ray += ["--num-gpus", str(plan.gpus_per_node), "--disable-usage-stats"]
    ray += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    variables = NODE_DEFAULTS | {"RAY_AUTH_MODE": "token", "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": str(NODE_WAIT_S)}
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{option}" for option in _directives(plan, time_limit)),
            "set -euo pipefail",
            "",
            *(f"export {name}={value}" for name, value in variables.items()),
            'export RAY_AUTH_TOKEN_PATH="$HOME/.trimtab/slurm-$SLURM_JOB_ID"',
            'trimtab cluster token "$RAY_AUTH_TOKEN_PATH"',
            "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT",
            "",
            "# The address, not the name: a machine may call itself 127.0.0.1.",
            # No pipe into `head`: its writer may die of SIGPIPE, and with pipefail the script too.
            'read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            'read -r head _ < <(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I)',
            "",
            f'srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:6379" {shlex.join(ray)} -- \\',
            f"  {shlex.join(plan.train_command)}",
            "",
        ]
    )


def _directives(plan: ManifestPlan, time_limit: str) -> list[str]:
    return [
        f"job-name={plan.name}",
        f"nodes={plan.num_nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={plan.cpus_per_node}",
        *([f"gpus-per-node={plan.gpus_per_node}"] if plan.gpus_per_node else []),
        f"mem={plan.memory_gib_per_node}G",
        f"time={time_limit}",
        "exclusive",
    ]
