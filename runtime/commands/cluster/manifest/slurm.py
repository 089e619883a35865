"""`trimtab cluster manifest slurm`."""

import argparse
import re

from runtime.commands.cluster.manifest.options import add_sizes, plan_of, write
from runtime.commands.command import CommandParser

HELP = "Slurm: a script for sbatch."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_sizes(parser)
    parser.add_argument("--time", type=_time_limit, default="24:00:00", help="limit of the job (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Write the script and return the exit code."""
    from cluster.nodes.manifests.slurm import slurm_script

    return write(options.out, slurm_script(plan_of(options), time_limit=options.time))


def _time_limit(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be [DAYS-]HOURS:MINUTES:SECONDS")
    return text
