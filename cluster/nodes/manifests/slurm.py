"""Slurm: a batch script that starts Ray on all nodes of the allocation, trains, and ends it (`ray symmetric-run`)."""

from __future__ import annotations

import shlex

from cluster.nodes.manifests.plan import ManifestPlan
from cluster.nodes.node import NODE_DEFAULTS
from cluster.ray.local_ray import OBJECT_STORE_BYTES

NODE_WAIT_S = 300  # Ray waits 30 s for all nodes, which is too short if a shared file system is slow.
# Slurm requeues the job of a silent node after SlurmdTimeout, 300 s unless a site chose another time. The run must wait
# longer for its lost worker: if it gave up before, the job would have failed and would not be requeued.
LOST_NODE_WAIT_S = 600


def slurm_script(plan: ManifestPlan, *, time_limit: str, run_dir: str, run_name: str | None) -> str:
    """The batch script. If the job loses a node, Slurm starts it again, and it goes on with its run.

    Each job has a token of its own, in the user's home, which the nodes must share. `ray symmetric-run` ends with `ray
    stop`, which ends all Ray processes of the user on a node: hence --exclusive.

    Args:
        time_limit: as Slurm writes it, [DAYS-]HOURS:MINUTES:SECONDS.
        run_dir, run_name: the settings run.dir and run.name. Without a name the run is named by the job and its number.
    """
    ray = ["--min-nodes", str(plan.num_nodes), "--num-cpus", str(plan.cpus_per_node)]
    ray += ["--num-gpus", str(plan.gpus_per_node), "--disable-usage-stats"]
    ray += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    defaults = NODE_DEFAULTS | {"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": str(NODE_WAIT_S)}
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{option}" for option in _directives(plan, time_limit)),
            "set -euo pipefail",
            "",
            *(f'export {name}="${{{name}:-{value}}}"' for name, value in defaults.items()),
            "export RAY_AUTH_MODE=token",
            'export RAY_AUTH_TOKEN_PATH="$HOME/.trimtab/slurm-$SLURM_JOB_ID"',
            'trimtab cluster token "$RAY_AUTH_TOKEN_PATH"',
            "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT",
            "",
            *_training(plan, run_dir, run_name),
            "",
            "# The address, not the name: a machine may call itself 127.0.0.1.",
            "# No pipe into `head`: its writer may die of SIGPIPE, and with pipefail the script too.",
            'read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            'read -r head _ < <(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I)',
            "",
            f'srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:6379" {shlex.join(ray)} -- "${{train[@]}}"',
            "",
        ]
    )


def _training(plan: ManifestPlan, run_dir: str, run_name: str | None) -> list[str]:
    """Lines that choose the command: a new run, or the run that the job began before it was requeued."""
    wait = ["--cluster.start_timeout_s", str(LOST_NODE_WAIT_S)]
    if run_name is None:
        run, name = f"{shlex.quote(run_dir)}/{plan.name}-$SLURM_JOB_ID", ' --run.name "${run##*/}"'
    else:
        run, name = shlex.quote(f"{run_dir}/{run_name}"), ""
    return [
        f"run={run}",
        f"train=({shlex.join([*plan.train_command[:2], *wait, *plan.train_command[2:]])}{name})",
        'if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then  # the job lost a node',
        '  if compgen -G "$run/checkpoints/step_*[0-9]" > /dev/null; then',
        '    train=(trimtab train --resume "$run")',
        '  elif [ -e "$run" ]; then',
        '    mv "$run" "$run.lost-$SLURM_RESTART_COUNT"  # nothing to go on from',
        "  fi",
        "fi",
    ]


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
        "requeue",  # after the loss of a node, whatever the site's default is
        "open-mode=append",  # else the output of the job's next start overwrites that of the last
    ]
