"""`trimtab cluster down`."""

import argparse
import sys

from runtime.commands.command import CommandParser

HELP = "End what `up` and `join` started on this machine, and nothing else."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument("address", nargs="?", metavar="ADDRESS", help="only the node at this address (all)")


def run(options: argparse.Namespace) -> int:
    """End the nodes and return the exit code."""
    from cluster.machine.node_state import read_nodes
    from cluster.nodes.node import stop

    nodes = [node for node in reversed(read_nodes()) if options.address in (None, node.address)]
    for node in nodes:  # the head last: the others say goodbye to it
        by_force = ", by force" if stop(node) else ""
        sys.stdout.write(f"ended the {'head' if node.is_head else 'node'} at {node.address}{by_force}\n")
    if not nodes:
        place = f" at {options.address}" if options.address else ""
        sys.stdout.write(f"nothing of `trimtab cluster` runs on this machine{place}\n")
    return 0
