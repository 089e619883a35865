"""`trimtab report RUN`."""

import argparse
import sys

from runtime.commands.command import CommandParser
from runtime.commands.options import add_run, run_of

HELP = "Write the report of a run again."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_run(parser)


def run(options: argparse.Namespace) -> int:
    """Write the report, print where it is, and return the exit code."""
    run_dir = run_of(options)
    from runtime.report.report import write_report

    sys.stdout.write(f"{write_report(run_dir)}\n")
    return 0
