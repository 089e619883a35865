"""`trimtab cluster join ADDRESS`."""

import argparse

from runtime.commands.cluster.node_options import DEFAULT_PORT, add_node_options, start_node
from runtime.commands.command import CommandParser

HELP = "Make this machine a node of the cluster whose head is at ADDRESS."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument("head", metavar="ADDRESS", help=f"the head: HOST or HOST:PORT ({DEFAULT_PORT})")
    parser.add_argument(
        "--bind", metavar="ADDRESS", help="address that others reach this machine by (that of the way to the head)"
    )
    add_node_options(parser)


def run(options: argparse.Namespace) -> int:
    """Start a node and return the exit code."""
    from cluster.nodes.node import local_address_to

    head = options.head if ":" in options.head else f"{options.head}:{DEFAULT_PORT}"
    return start_node(options, address=options.bind or local_address_to(head), head=head)
