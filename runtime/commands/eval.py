"""`trimtab eval RUN`."""

import argparse

from runtime.commands.command import CommandParser
from runtime.commands.options import add_run, add_worker_options, positive, run_of

HELP = "Measure a run's model on the held-out text."
PLACES = ("data.path", "data.cache_dir")  # settings of `trimtab train` that may be other ones now


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_run(parser)
    parser.add_argument("--sequences", type=positive, help="sequences to evaluate (as in training)")
    add_worker_options(parser)
    parser.add_argument("--data.path", metavar="PATH", help="where the run's text lies now; it is compared by content")
    parser.add_argument("--data.cache_dir", metavar="DIR", help="where its prepared tokens are kept")


def run(options: argparse.Namespace) -> int:
    """Evaluate and return the exit code."""
    run_dir = run_of(options)
    from runtime.commands import inference

    places = {name: getattr(options, name) for name in PLACES}
    return inference.evaluate(
        run_dir,
        sequences=options.sequences,
        step=options.step,
        workers=options.workers,
        device=options.device,
        settings=[f"--{name}={value}" for name, value in places.items() if value is not None],
    )
