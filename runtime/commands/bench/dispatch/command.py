"""`trimtab bench dispatch`."""

import argparse

from dispatch.exchange.registry import BACKENDS
from runtime.commands.bench.dispatch.choices import DTYPES, PAYLOADS
from runtime.commands.command import CommandParser
from runtime.commands.options import float_in, positive
from runtime.commands.out import out_dir

HELP = "The MoE layer: time of each phase, bytes, bandwidth, matmul rate, and the limits of this machine."

OUT_DIR = "runs/bench-dispatch"

DESCRIPTION = """\
Measure the MoE layer, forward and backward, on this machine: the time of each phase, bytes, bandwidth and matmul rate,
compared with bare matmuls of the same shapes and a bare all-to-all of the same bytes. All take turns in the same
processes, with fresh tokens in every round. Under torchrun its ranks take part, also on several nodes."""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options. `case_of` fills in those of the layer and the exchange that are not given: None."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_layer(parser.add_argument_group("layer"))
    _add_exchange(parser.add_argument_group("exchange"))
    _add_run(parser.add_argument_group("measurement"))


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write samples and picture. Returns the exit code."""
    from runtime.commands.bench.dispatch.benchmark import run_benchmark
    from runtime.commands.bench.dispatch.case import case_of

    return run_benchmark(case_of(options), out_dir(options.out))


def _add_layer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--config", metavar="FILE", help="training configuration or preset that gives what the options leave out")
    add("--tokens", type=positive, metavar="T", help="tokens of each rank (4096; with --config a micro-batch)")
    add("--hidden", type=positive, metavar="H", help="width of a token (512)")
    add("--ffn-hidden", type=positive, metavar="F", help="inner width of an expert (256)")
    add("--num-experts", type=positive, metavar="E", help="experts over all ranks (64)")
    add("--top-k", type=positive, metavar="K", help="experts of a token (8)")
    add("--dtype", nargs="+", choices=DTYPES, help="of rows and experts (both; with --config its own)")
    add("--workload", metavar="W0..W7", help="which experts tokens choose: W0 balanced, W1 hot experts, W2 a hot rank, "
        "W3 a hot expert on each rank, W4 ranks of unequal batches, W5 idle ranks and experts, W6 a moving hot spot, "
        "W7 bursts (random tokens and the router's own choice)")  # fmt: skip
    add("--skew", type=float_in(1, 1000), metavar="X", help="with --workload: load of a hot expert over the mean load")


def _add_exchange(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--exchange", choices=BACKENDS.choices, help="a token travels once for each expert (assignment), rank or node "
        "that it needs (auto)")  # fmt: skip
    add("--ranks-per-node", type=positive, metavar="N", help="neighbouring ranks that count as a node (all here)")
    add("--payload", choices=PAYLOADS, help="how rows travel to their experts (compute)")
    add("--chunks", type=positive, metavar="N", help="cut the batch, to compute while rows travel; measured beside "
        "the same without overlap and uncut (1)")  # fmt: skip


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workers", type=positive, metavar="N", help="expert-parallel ranks (2; under torchrun its world)")
    add("--threads", type=positive, metavar="N", help="CPU threads of a rank (an equal share of the cores)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: one GPU for each rank (auto)")
    add("--rounds", type=positive, default=7, metavar="N", help="samples of each measurement (%(default)s)")
    add("--out", default=OUT_DIR, metavar="DIR", help="folder of picture and samples (%(default)s)")
