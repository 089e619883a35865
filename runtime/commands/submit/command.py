"""`trimtab submit -- COMMAND`."""

import argparse
import importlib.util
from pathlib import Path

from runtime.commands.command import CommandParser

HELP = "Run a command on a cluster as a job, with this folder's code."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options; the command behind -- is left."""
    parser.usage = "trimtab submit [options] -- COMMAND ...   or   trimtab submit --list | --logs JOB | --stop JOB"
    parser.description = (
        "Run a command of trimtab as a job on a cluster, with the code of this folder, and follow it to its end: the "
        "exit code is the job's. Or list, follow or end jobs."
    )
    parser.add_argument(
        "--address", default="auto", help="head as HOST:PORT, or URL of its job API (the head on this machine)"
    )
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="tree of trimtab whose code runs (this folder)"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="show the jobs of the cluster")
    instead.add_argument("--logs", metavar="JOB", help="follow a job")
    instead.add_argument("--stop", metavar="JOB", help="end a job")
    parser.leave("command", "behind --")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Submit, follow, list or stop. Returns the exit code: of a job that is followed, the job's own."""
    asks_only = options.list or options.logs or options.stop
    if options.command and asks_only:
        options.refuse("--list, --logs and --stop run nothing; leave out the command behind --")
    if not (options.command or asks_only):
        options.refuse("nothing to run; give a command of trimtab behind --, as in: trimtab submit -- train --name a")
    from runtime.commands.submit.jobs import JobsUnavailable, submit

    if importlib.util.find_spec("aiohttp") is None:
        raise JobsUnavailable("submitting needs ray[default], which is not installed: pip install 'trimtab[cluster]'")
    return submit(options)
