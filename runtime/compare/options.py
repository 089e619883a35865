"""The options of `trimtab compare`. Imports neither torch nor Ray: `--help` stays quick."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.option_types import number, whole

DEFAULT_PRESET = "compare"
DEFAULT_SEEDS = 3
USAGE = "trimtab compare --laws SPEC [SPEC ...] [--seeds N] [--SECTION.SETTING VALUE ...] | --resume [--out DIR]"
SPECS = """\
A SPEC is a law with its settings, as newton, sign:u=0.003 (u is the rate) or smebu:rate=0.01,beta=0.9; or an auxiliary
loss, as aux:alpha=0.001 (over a micro-batch on one worker), global_batch:alpha=0.01 or sequence:alpha=0.0001; or both,
joined by +. Any setting of `trimtab train` can be given by its dotted name and holds for all runs.
"""


@dataclass(frozen=True)
class CompareOptions:
    """A command line of `trimtab compare`. None: not given. settings: the options that are those of `trimtab train`."""

    laws: list[str] | None
    seeds: int | None
    resume: bool
    out: Path
    config: str | None
    jobs: int | None
    threshold: float | None
    settings: list[str]


def parse_options(arguments: Sequence[str]) -> CompareOptions:
    """Read the command line; settings are checked later.

    Raises:
        SystemExit: --help was asked for and answered, or an option is wrong.
        ValueError: options that contradict each other.
    """
    given, settings = _parser().parse_known_args(list(arguments))
    options = CompareOptions(**vars(given), settings=settings)
    if not options.resume and not options.laws:
        raise InvalidValue("--laws is missing: name the methods to compare, as in --laws sign:u=0.003 newton quantile")
    if options.resume and options.config:
        raise InvalidValue("--resume takes the settings of the comparison, so --config cannot be given; leave one out")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab compare",
        usage=USAGE,
        description="Train the same model from the same seeds under several ways of balancing, and compare them.",
        epilog=SPECS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--laws", nargs="+", metavar="SPEC", help="the methods, see below")
    add("--seeds", type=whole(1), metavar="N", help=f"runs of each method ({DEFAULT_SEEDS}), from run.seed on")
    add("--resume", action="store_true", help="go on with the comparison in --out; laws and seeds may be added")
    add("--out", type=Path, metavar="DIR", default=Path("runs/compare"), help="where all of it goes (%(default)s)")
    add("--config", metavar="FILE", help=f"YAML file or preset of the settings ({DEFAULT_PRESET})")
    add("--jobs", type=whole(1), metavar="J", help="runs side by side (the cores over cluster.num_workers)")
    add(
        "--threshold",
        type=number(0, 1e6),
        metavar="X",
        help="MaxVio_batch below which a method counts as balanced (1.5 times the lowest of any method)",
    )
    return parser
