"""`trimtab bench coordinator`."""

import argparse

from runtime.commands.command import CommandParser
from runtime.commands.options import positive
from runtime.commands.out import out_dir

HELP = "The control path: a round of real ranks and coordinator by phase, and a model of up to 2,048 ranks."

OUT_DIR = "runs/bench-coordinator"

DESCRIPTION = """\
Measure the control path of a step on this machine. First the coordinator, as a function and as the Ray actor, under a
load generator that sends it real reports. Then whole rounds of real ranks: counts summed, one report, one answer, one
broadcast. Then what one hop between two of the ranks costs, and from that a model of up to 2,048 ranks, printed beside
what was measured. The model is of a network whose hops cost what they cost here, on loopback."""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--layers", type=positive, default=61, metavar="L", help="MoE layers (%(default)s)")
    add("--experts", type=positive, default=256, metavar="E", help="experts of a layer (%(default)s)")
    add("--law", default="sign", help="balancing law of the rounds and of the model (%(default)s)")
    add("--workers", type=positive, default=8, metavar="N", help="ranks at most; also 1, 2, 4, ... below (%(default)s)")
    add("--rounds", type=positive, default=50, metavar="N", help="samples of everything (%(default)s)")
    add("--out", default=OUT_DIR, metavar="DIR", help="folder of picture and samples (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables, write samples and picture. Returns the exit code."""
    from runtime.commands.bench.coordinator.case import ControlCase

    case = ControlCase(options.layers, options.experts, options.law, options.workers, options.rounds)
    out = out_dir(options.out)
    from runtime.commands.bench.coordinator.benchmark import run_benchmark

    return run_benchmark(case, out)
