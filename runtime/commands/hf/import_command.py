"""`trimtab import DIR RUN`."""

import argparse
from pathlib import Path

from runtime.commands.command import CommandParser
from runtime.commands.options import add_runs_dir
from runtime.runs.run_dir import place_of_run

HELP = "Make a run from a model of Hugging Face."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options; those of `trimtab train` are left."""
    parser.usage = "trimtab import DIR RUN [--SECTION.SETTING VALUE ...]"
    parser.epilog = "Settings are those of `trimtab train`, such as --model.max_seq_len 512 or --data.path TEXT."
    parser.add_argument("folder", metavar="DIR", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("run", metavar="RUN", help="the run to make: its directory, or its name in the folder of runs")
    add_runs_dir(parser)
    parser.leave("settings", "unknown options")


def run(options: argparse.Namespace) -> int:
    """Import and return the exit code."""
    from runtime.commands.hf.import_model import import_model

    return import_model(options.folder, place_of_run(options.run, options.runs_dir), options.settings)
