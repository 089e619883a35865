"""`trimtab cluster up`."""

import argparse

from runtime.commands.cluster.node_options import DEFAULT_PORT, add_node_options, start_node
from runtime.commands.command import CommandParser
from runtime.commands.options import int_from

HELP = "Start a cluster with this machine as its head, on loopback unless --bind says more."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--bind",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address that others reach this machine by; Ray then listens on all interfaces (%(default)s: none)",
    )
    parser.add_argument("--port", type=int_from(1024), default=DEFAULT_PORT, help="port of the head (%(default)s)")
    parser.add_argument(
        "--dashboard-port",
        type=int_from(1024),
        default=8265,
        help="port of dashboard and job API, always on loopback (%(default)s)",
    )
    add_node_options(parser)


def run(options: argparse.Namespace) -> int:
    """Start the head and return the exit code."""
    ports = {"port": options.port, "dashboard_port": options.dashboard_port}
    return start_node(options, address=options.bind, head=None, **ports)
