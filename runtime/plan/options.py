"""The options of `trimtab plan`. Imports no torch: help and mistakes are answered at once."""

import argparse

from runtime.option_types import number, whole

DESCRIPTION = """\
What a training run would need, told before anything starts: parameters, memory of each rank, and bytes that the
all-to-all exchanges put on the network and inside a node in a step. Loads are taken as balanced."""

CONFIG_HELP = """preset or YAML file of Trimtab, a run (its directory, or its name in runs/), or a Hugging Face
config.json or its directory"""


def plan_parser() -> argparse.ArgumentParser:
    """A parser whose options are None where they were not given."""
    parser = argparse.ArgumentParser(prog="trimtab plan", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("config", metavar="CONFIG", help=CONFIG_HELP)
    add("--world", type=whole(1), metavar="N", help="ranks, a device each (workers of the configuration)")
    add("--ep", type=whole(1), metavar="N", help="ranks that share one set of experts (as configured; else all ranks)")
    add("--ranks-per-node", type=whole(1), metavar="N", help="neighbouring ranks of one machine (8, or all if fewer)")
    add("--exchange", choices=("auto", "assignment", "rank", "node"), help="what travels (as configured)")
    add(
        "--batch",
        type=whole(1),
        metavar="N",
        help="sequences of a step, over all ranks (as configured; else one a rank)",
    )
    add("--micro-batch", type=whole(1), metavar="N", help="sequences that a rank computes at once (as configured)")
    add(
        "--seq-len",
        type=whole(1),
        metavar="N",
        help="tokens of a sequence (as configured; of config.json at most 4096)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="number format of the computation (as configured; bfloat16)")
    add("--recompute", action="store_true", default=None, help="recompute the activations of a layer in backward")
    add("--mtp", type=int, choices=(0, 1), help="layers for multi-token prediction (as configured; of config.json 0)")
    add("--memory-gib", type=number(0.01, 1e6), default=80, metavar="GIB", help="memory of a device (%(default)s)")
    add("--json", action="store_true", help="print the plan as JSON")
    return parser
