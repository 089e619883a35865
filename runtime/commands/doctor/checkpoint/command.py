"""`trimtab doctor PATH`."""

import argparse

from runtime.commands.command import CommandParser
from runtime.commands.options import file_to_write, int_from
from runtime.settings.consent import add_consent

HELP = "A run, a checkpoint or a directory of Hugging Face: files, experts, values, biases, configuration."

DESCRIPTION = """\
Examine a checkpoint without a GPU and without the memory of a model: every expert there once and unlike the others,
values finite, shapes and dtypes those of the configuration, biases fp32, moved and centred, files as they were written.
Ends with 1 and names file and tensor where something is wrong."""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add_consent(parser)
    parser.add_argument(
        "path", metavar="PATH", help="a run (its directory, or its name in runs/), a checkpoint, or a directory of "
        "Hugging Face with config.json and safetensors"
    )  # fmt: skip
    parser.add_argument("--step", type=int_from(0), help="of a run: its checkpoint (the newest)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write everything that was found there")


def run(options: argparse.Namespace) -> int:
    """Examine what lies there, print what was found, and return the exit code: 1 where something is wrong."""
    from runtime.commands.doctor.checkpoint.examine import examine

    return examine(options.path, options.step, options.json)
