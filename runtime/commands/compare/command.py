"""`trimtab compare`."""

import argparse
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import float_in, folder_to_write, positive
from runtime.settings.consent import import_named

HELP = "Train under several ways of balancing from the same seeds, and compare them."

DEFAULT_PRESET = "compare"
DEFAULT_SEEDS = 3
USAGE = "trimtab compare --laws SPEC [SPEC ...] [--seeds N] [--SECTION.SETTING VALUE ...] | --resume [--out DIR]"
SPECS = """\
A SPEC is a law with its settings, as newton, sign:u=0.003 (u is the rate) or smebu:rate=0.01,beta=0.9; or an auxiliary
loss, as aux:alpha=0.001 (over a micro-batch on one worker), global_batch:alpha=0.01 or sequence:alpha=0.0001; or both,
joined by +. Any setting of `trimtab train` can be given by its dotted name and holds for all runs.
"""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options; those of `trimtab train` are left."""
    parser.usage = USAGE
    parser.description = "Train the same model from the same seeds under several ways of balancing, and compare them."
    parser.epilog = SPECS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--laws", nargs="+", action="extend", metavar="SPEC", help="the methods, see below")
    add("--seeds", type=positive, metavar="N", help=f"runs of each method ({DEFAULT_SEEDS}), from run.seed on")
    add("--resume", action="store_true", help="go on with the comparison in --out; laws and seeds may be added")
    add(
        "--out",
        type=folder_to_write,
        metavar="DIR",
        default=Path("runs/compare"),
        help="where all of it goes (%(default)s)",
    )
    add("--config", metavar="FILE", help=f"YAML file or preset of the settings ({DEFAULT_PRESET})")
    add("--jobs", type=positive, metavar="J", help="runs side by side (the cores over cluster.num_workers)")
    add(
        "--threshold",
        type=float_in(0, 1e6),
        metavar="X",
        help="MaxVio_batch below which a method counts as balanced (1.5 times the lowest of any method)",
    )
    parser.leave("settings", "unknown options")


def run(options: argparse.Namespace) -> int:
    """Compare and return the exit code."""
    check_options(options)
    import_named(options.settings)
    from runtime.commands.compare.comparison import compare

    return compare(options)


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and fill in those of a new comparison. Raises InvalidValue."""
    if options.resume:
        if options.config:
            raise InvalidValue(
                "--resume takes the settings of the comparison, so --config cannot be given; leave one out"
            )
        return
    if not options.laws:
        raise InvalidValue("--laws is missing: name the methods to compare, as in --laws sign:u=0.003 newton quantile")
    options.config = options.config or DEFAULT_PRESET
    options.seeds = options.seeds or DEFAULT_SEEDS
