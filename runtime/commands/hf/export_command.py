"""`trimtab export RUN DIR`."""

import argparse
from pathlib import Path

from runtime.commands.command import CommandParser
from runtime.commands.options import add_run, float_in, int_from, run_of

HELP = "Write an imported run as a model of Hugging Face."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_run(parser)
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="directory to make")
    add("--step", type=int_from(0), help="checkpoint to export (the newest)")
    add("--merged", action="store_true", help="the whole model of a run with adapters, added to its weights")
    add("--drop-bias", action="store_true", help="leave out a selection bias that the family lacks")
    add("--max-file-gb", type=float_in(0.001, 1000), default=5.0, help="tensors of one file in GB (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Export and return the exit code."""
    run_dir = run_of(options)
    from runtime.commands.hf.export_model import export_model

    return export_model(
        run_dir,
        options.folder,
        step=options.step,
        merged=options.merged,
        drop_bias=options.drop_bias,
        max_file_bytes=int(options.max_file_gb * 1e9),
    )
