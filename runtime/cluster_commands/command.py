"""`trimtab cluster ACTION`: start, join, show and end a cluster of one's own machines; manifests for others."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.token import default_token_file, ensure_token
from runtime.choices import Choices, choice_parser, chosen
from runtime.option_types import whole

if TYPE_CHECKING:
    from cluster.node import NodeOptions

DEFAULT_PORT = 6379


def cluster(arguments: Sequence[str]) -> int:
    """Do with the cluster what the first argument names and return the exit code."""
    parser = choice_parser("trimtab cluster", "ACTION", ACTIONS, "Make machines a Ray cluster.")
    return ACTIONS[chosen(parser, arguments)](arguments[1:])


def up(arguments: Sequence[str]) -> int:
    """Start a cluster with this machine as its head, on loopback unless --bind says more."""
    parser = _parser("up", up)
    parser.add_argument(
        "--bind",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address that others reach this machine by; Ray then listens on all interfaces (%(default)s: none)",
    )
    parser.add_argument("--port", type=whole(1024), default=DEFAULT_PORT, help="port of the head (%(default)s)")
    parser.add_argument(
        "--dashboard-port",
        type=whole(1024),
        default=8265,
        help="port of dashboard and job API, always on loopback (%(default)s)",
    )
    _add_node_options(parser)
    given = _parse_before_dashes(parser, arguments)
    return _start(given, address=given.bind, head=None, port=given.port, dashboard_port=given.dashboard_port)


def join(arguments: Sequence[str]) -> int:
    """Make this machine a node of the cluster whose head is at ADDRESS."""
    parser = _parser("join", join)
    parser.add_argument("head", metavar="ADDRESS", help=f"the head: HOST or HOST:PORT ({DEFAULT_PORT})")
    parser.add_argument(
        "--bind", metavar="ADDRESS", help="address that others reach this machine by (that of the way to the head)"
    )
    _add_node_options(parser)
    given = _parse_before_dashes(parser, arguments)
    from cluster.node import local_address_to

    head = given.head if ":" in given.head else f"{given.head}:{DEFAULT_PORT}"
    return _start(given, address=given.bind or local_address_to(head), head=head)


def status(arguments: Sequence[str]) -> int:
    """Show nodes, resources, and who runs what."""
    parser = _parser("status", status)
    parser.add_argument("--address", metavar="HOST:PORT", default="auto", help="the head (that of this machine's node)")
    given = parser.parse_args(arguments)
    from runtime.cluster_commands.status import show

    return show(given.address, Console(highlight=False))


def down(arguments: Sequence[str]) -> int:
    """End what `up` and `join` started on this machine, and nothing else."""
    parser = _parser("down", down)
    parser.add_argument("address", nargs="?", metavar="ADDRESS", help="only the node at this address (all)")
    given = parser.parse_args(arguments)
    from cluster.node import stop
    from cluster.node_state import read_nodes

    nodes = [node for node in reversed(read_nodes()) if given.address in (None, node.address)]
    for node in nodes:  # the head last: the others say goodbye to it
        killed = stop(node)
        _say(f"ended the {'head' if node.is_head else 'node'} at {node.address}" + (", by force" if killed else ""))
    if not nodes:
        _say("nothing of `trimtab cluster` runs on this machine" + (f" at {given.address}" if given.address else ""))
    return 0


def token(arguments: Sequence[str]) -> int:
    """Make the token file that a cluster's machines share, where there is none, and print its place."""
    parser = _parser("token", token)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"where ({default_token_file()})")
    given = parser.parse_args(arguments)
    sys.stdout.write(f"{ensure_token((given.file or default_token_file()).absolute())}\n")
    return 0


def manifest(arguments: Sequence[str]) -> int:
    """Write the file that starts a cluster under Kubernetes, Slurm or `ray up`."""
    from runtime.cluster_commands.manifest import write

    return write(arguments)


ACTIONS: Choices = {"up": up, "join": join, "status": status, "down": down, "token": token, "manifest": manifest}


def _parser(name: str, action: object) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"trimtab cluster {name}", description=action.__doc__, allow_abbrev=False)


def _add_node_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-cpus", type=whole(0), help="CPUs to offer (all)")
    parser.add_argument("--num-gpus", type=whole(0), help="GPUs to offer (all)")
    parser.add_argument(
        "--object-store-mb", type=whole(84), default=84, help="shared memory of Ray's object store (%(default)s)"
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


def _parse_before_dashes(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Argparse's own `--` would take the rest for positional arguments."""
    given = list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    parsed = parser.parse_args(given[:cut])
    parsed.ray_arguments = tuple(given[cut + 1 :])
    return parsed


def _start(given: argparse.Namespace, *, address: str, head: str | None, **ports: int) -> int:
    from cluster.node import AlreadyRunning, NodeOptions, start

    options = NodeOptions(
        address=address,
        head=head,
        num_cpus=given.num_cpus,
        num_gpus=given.num_gpus,
        object_store_bytes=given.object_store_mb * 10**6,
        token_file=None if given.without_token else given.token_file.absolute(),
        ray_arguments=given.ray_arguments,
        **ports,
    )
    console = Console(highlight=False, stderr=True)
    try:
        with console.status("starting Ray") as shown:
            node = start(options, lambda missing: shown.update(f"starting Ray: {missing}"))
    except AlreadyRunning as running:
        if not running.same:
            raise
        _say(str(running))
        return 0
    _say(_next_steps(options, node.dashboard))
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
