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
    from runtime.settings.config_file import parse_train

    plan = plan_of(options)
    request = parse_train(plan.train_command[2:])
    run_dir, run_name = request.config.run.dir, request.config.run.name
    if request.resume is not None:
        run_dir, run_name = str(request.resume.absolute().parent), request.resume.name
    return write(options.out, slurm_script(plan, time_limit=options.time, run_dir=run_dir, run_name=run_name))


def _time_limit(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} must be [DAYS-]HOURS:MINUTES:SECONDS")
    return text
