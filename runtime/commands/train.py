"""`trimtab train`. Its settings, and the help of them, are made from the dataclasses in `runtime/settings`."""

import argparse

from runtime.commands.command import CommandParser

HELP = "Train a model, or go on with a run."


def add_arguments(parser: CommandParser) -> None:
    """Leave all of the command line, --help too, to the parser of the settings."""
    parser.leave("arguments", "everything")


def run(options: argparse.Namespace) -> int:
    """Train and return the exit code."""
    from cluster.nodes.gpus import count_gpus
    from runtime.settings.config_file import parse_train

    request = parse_train(options.arguments, count_gpus)
    from runtime.job import job

    return job.train(
        request.config,
        resume=request.resume,
        step=request.step,
        init=request.init,
        dry_run=request.dry_run,
        watch=request.watch,
    )
