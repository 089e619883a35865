"""`trimtab cluster status`: a table of the nodes, and who runs what on them."""

import argparse
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from runtime.commands.command import CommandParser
from runtime.terminal.quantities import counted
from runtime.terminal.tables import new_table

if TYPE_CHECKING:
    from cluster.nodes.status import ClusterStatus, JobStatus, NodeStatus

HELP = "Show nodes, resources, and who runs what."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument("--address", metavar="HOST:PORT", default="auto", help="the head (that of this machine's node)")


def run(options: argparse.Namespace) -> int:
    """Print the cluster at HOST:PORT, or for "auto" this machine's. Returns 1 where none answers."""
    from cluster.nodes.status import read_status
    from cluster.ray.access import check_access, find_access

    console = Console(highlight=False)
    access = find_access(options.address)
    if access.gcs_address == "auto":
        console.print("no cluster: this machine is no node of one; start one with `trimtab cluster up`", markup=False)
        return 1
    check_access(access, allow_open=True)
    status = read_status(access)
    alive = sum(node.alive for node in status.nodes)
    console.print(
        f"cluster {access.gcs_address}: {counted(alive, 'node')} alive, {len(status.nodes) - alive} gone", markup=False
    )
    token = access.node and access.node.token_file
    console.print(f"token {token}" if token else f"authentication {'on' if access.variables else 'off'}", markup=False)
    console.print(node_table(status))
    _print_jobs(status, console)
    return 0


def node_table(status: "ClusterStatus") -> Table:
    """One row a node, the head first."""
    heads = ("node", "host", "state", "CPUs", "GPUs", "memory", "object store", "labels")
    table = new_table(heads, left=(0, 1, 2, 7), wrap=range(len(heads)), padding=(0, 1))
    for node in status.nodes:
        state = ("head" if node.is_head else "alive") if node.alive else "gone"
        labels = " ".join(f"{name}={value}" for name, value in sorted(node.labels.items()))
        memory, store = (_gib(node.total.get(name, 0.0)) for name in ("memory", "object_store_memory"))
        table.add_row(node.address, node.host, state, _share(node, "CPU"), _share(node, "GPU"), memory, store, labels)
    return table


def _print_jobs(status: "ClusterStatus", console: Console) -> None:
    if not status.jobs:
        console.print("\nno job runs")
    for job in status.jobs:
        since = f"{datetime.fromtimestamp(job.started_ms / 1000):%Y-%m-%d %H:%M:%S}"
        console.print(f"\njob {job.job_id} since {since}, driver on {job.address}: {job.entrypoint}", markup=False)
        for node in status.nodes:
            if who := _actors(node, job):
                console.print(f"  {node.address}: {who}", markup=False)


def _actors(node: "NodeStatus", job: "JobStatus") -> str:
    own = node.actors.get(job.job_id, {})
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in sorted(own.items()))


def _share(node: "NodeStatus", resource: str) -> str:
    total = node.total.get(resource, 0.0)
    return f"{node.used(resource):g}/{total:g}" if node.alive and total else "-"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "-"
