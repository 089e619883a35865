"""`trimtab doctor cluster`."""

import argparse

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import file_to_write, positive

HELP = "The nodes of a Ray cluster, or this machine: versions, devices, clocks, disks, network, process groups."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help='Ray cluster to join, or "auto" for the one this machine belongs to; without, this machine alone',
    )
    parser.add_argument("--workers", type=positive, help="ranks to join (one for each GPU, else for each node; here 2)")
    parser.add_argument("--ep-size", type=positive, help="ranks that share one set of experts (all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where they compute (auto)")
    parser.add_argument(
        "--path",
        action="append",
        default=["runs", "~/.cache/trimtab", "/tmp"],  # noqa: S108 Ray's own place, looked at only.
        help="look at the disk of this path on every node; again for more (runs, ~/.cache/trimtab and /tmp always)",
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write everything that was found there")


def run(options: argparse.Namespace) -> int:
    """Examine the cluster, print what was found, and return the exit code: 1 where something is wrong."""
    workers = options.workers or (None if options.address else 2)
    if workers and options.ep_size and workers % options.ep_size:
        raise InvalidValue(f"--ep-size ({options.ep_size}) must divide --workers ({workers})")
    from runtime.commands.doctor.cluster.diagnosis import diagnose

    return diagnose(
        address=options.address,
        num_workers=workers,
        ep_size=options.ep_size,
        device=options.device,
        paths=tuple(dict.fromkeys(options.path)),
        record=options.json,
    )
