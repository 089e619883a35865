"""The picture of a cluster: a table of its nodes, and who runs what on them."""

from datetime import datetime

from rich.console import Console
from rich.table import Table

from cluster.access import check_access, find_access
from cluster.status import ClusterStatus, JobStatus, NodeStatus, read_status
from runtime.quantities import counted


def show(address: str, console: Console) -> int:
    """Print the cluster at HOST:PORT, or for "auto" this machine's. Returns 1 where none answers."""
    access = find_access(address)
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


def node_table(status: ClusterStatus) -> Table:
    """One row a node, the head first."""
    table = Table(box=None, pad_edge=False)
    for column in ("node", "host", "state", "CPUs", "GPUs", "memory", "object store", "labels"):
        table.add_column(column, justify="right" if column in ("CPUs", "GPUs", "memory", "object store") else "left")
    for node in status.nodes:
        state = ("head" if node.is_head else "alive") if node.alive else "gone"
        labels = " ".join(f"{name}={value}" for name, value in sorted(node.labels.items()))
        store = _gib(node.total.get("object_store_memory", 0.0))
        table.add_row(
            node.address, node.host, state, _share(node, "CPU"), _share(node, "GPU"), _memory(node), store, labels
        )
    return table


def _print_jobs(status: ClusterStatus, console: Console) -> None:
    if not status.jobs:
        console.print("\nno job runs")
    for job in status.jobs:
        since = f"{datetime.fromtimestamp(job.started_ms / 1000):%Y-%m-%d %H:%M:%S}"
        console.print(f"\njob {job.job_id} since {since}, driver on {job.address}: {job.entrypoint}", markup=False)
        for node in status.nodes:
            if who := _actors(node, job):
                console.print(f"  {node.address}: {who}", markup=False)


def _actors(node: NodeStatus, job: JobStatus) -> str:
    own = node.actors.get(job.job_id, {})
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in sorted(own.items()))


def _share(node: NodeStatus, resource: str) -> str:
    total = node.total.get(resource, 0.0)
    return f"{node.used(resource):g}/{total:g}" if node.alive and total else "-"


def _memory(node: NodeStatus) -> str:
    return _gib(node.total.get("memory", 0.0))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "-"
