"""`trimtab cluster token`."""

import argparse
import sys
from pathlib import Path

from cluster.machine.token import default_token_file, ensure_token
from runtime.commands.command import CommandParser

HELP = "Make the token file that a cluster's machines share, where there is none, and print its place."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"where ({default_token_file()})")


def run(options: argparse.Namespace) -> int:
    """Make the file and return the exit code."""
    sys.stdout.write(f"{ensure_token((options.file or default_token_file()).absolute())}\n")
    return 0
