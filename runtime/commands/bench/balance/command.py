"""`trimtab bench balance`."""

import argparse

from runtime.commands.command import CommandParser
from runtime.commands.options import int_from, positive
from runtime.commands.out import out_dir

HELP = "The balancing laws on simulated routers and recorded runs, beside the published law, tuned."

OUT_DIR = "runs/bench-balance"

DESCRIPTION = """\
Play the balancing laws on routers without a model, with fixed seeds, and on the scores that runs recorded
(trimtab train --balance.record): how soon each balances, how soon it recovers when the mix of the text shifts, and what
imbalance is left, beside the sign law of arXiv 2408.15664 at its published rate and tuned for each figure."""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--seeds", type=int_from(0), default=3, metavar="N", help="simulated routers, seeds 0 to N - 1 (%(default)s)")
    add(
        "--steps",
        type=int_from(40),
        default=400,
        metavar="N",
        help="steps of each, a shift of text at 5/8 (%(default)s)",
    )
    add("--run", action="append", default=[], metavar="RUN", help="a run with recorded scores; may be repeated")
    add("--first", type=positive, metavar="STEP", help="use the runs from this training step on too, without a bias")
    add("--law", action="append", default=[], metavar="SPEC", help="one more law, as smebu:rate=0.02; may be repeated")
    add("--out", default=OUT_DIR, metavar="DIR", help="folder of pictures and figures (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Play all laws on every trace, print the results, and write figures and pictures. Returns the exit code."""
    from runtime.commands.bench.balance.benchmark import run_benchmark

    return run_benchmark(options.seeds, options.steps, options.run, options.first, options.law, out_dir(options.out))
