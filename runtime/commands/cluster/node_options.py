"""The options that `up` and `join` share, and the start of a node with them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.machine.token import default_token_file
from runtime.commands.command import CommandParser
from runtime.commands.options import int_from

if TYPE_CHECKING:
    from cluster.nodes.node import NodeOptions

DEFAULT_PORT = 6379


def add_node_options(parser: CommandParser) -> None:
    """Declare the resources and the token of a node. What follows -- is left for `ray start`."""
    parser.add_argument("--num-cpus", type=int_from(0), help="CPUs to offer (all)")
    parser.add_argument("--num-gpus", type=int_from(0), help="GPUs to offer (all)")
    parser.add_argument(
        "--object-store-mb", type=int_from(84), default=84, help="shared memory of Ray's object store (%(default)s)"
    )
    parser.add_argument(
        "--token-file", type=Path, default=default_token_file(), help="the cluster's token (%(default)s)"
    )
    parser.add_argument(
        "--without-token",
        action="store_true",
        help="demand no token: whoever reaches the ports runs code on all machines",
    )
    parser.epilog = "Options behind -- go to `ray start`, such as -- --labels zone=a"
    parser.leave("ray_arguments", "behind --")


def start_node(options: argparse.Namespace, *, address: str, head: str | None, **ports: int) -> int:
    """Start Ray on this machine and print what to do next. head: the one to join, None to be the head.

    Returns:
        The exit code.

    Raises:
        AlreadyRunning: another node runs at this address, with other options.
    """
    from cluster.nodes.node import AlreadyRunning, NodeOptions, start

    node_options = NodeOptions(
        address=address,
        head=head,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        object_store_bytes=options.object_store_mb * 10**6,
        token_file=None if options.without_token else options.token_file.absolute(),
        ray_arguments=tuple(options.ray_arguments),
        **ports,
    )
    from rich.console import Console

    console = Console(highlight=False, stderr=True)
    try:
        with console.status("starting Ray") as shown:
            node = start(node_options, lambda missing: shown.update(f"starting Ray: {missing}"))
    except AlreadyRunning as running:
        if not running.same:
            raise
        _say(str(running))
        return 0
    _say(_next_steps(node_options, node.dashboard))
    return 0


def _next_steps(options: "NodeOptions", dashboard: str | None) -> str:
    if options.head is not None:
        return f"{options.address} is a node of the cluster of {options.head}; see trimtab cluster status"
    lines = [
        f"the head runs at {options.gcs_address}",
        f"train here: trimtab train --cluster.address {options.gcs_address}",
    ]
    if options.token_file is None:
        lines.append("it demands NO token: whoever reaches its ports runs code here")
    else:
        lines.append(f"token: {options.token_file}")
    if not options.only_loopback:
        lines.append(f"on each other machine, with a copy of the token: trimtab cluster join {options.gcs_address}")
        lines.append("Ray listens on all interfaces and does not encrypt: keep its ports on a private network")
    if dashboard is None:
        lines.append("no dashboard and no trimtab submit: pip install 'trimtab[cluster]' for them")
    else:
        lines.append(f"submit: trimtab submit -- train ...; dashboard: {dashboard}, on this machine only")
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
