"""`trimtab plan CONFIG`."""

import argparse
import sys

from dispatch.exchange.registry import BACKENDS
from runtime.commands.command import CommandParser
from runtime.commands.options import number, whole
from runtime.settings.consent import add_consent

HELP = "Tell the memory of each rank and the bytes of a step before anything starts."

DESCRIPTION = """\
What a training run would need, told before anything starts: parameters, memory of each rank, and bytes that the
all-to-all exchanges put on the network and inside a node in a step. Loads are taken as balanced."""

CONFIG_HELP = """preset or YAML file of Trimtab, a run (its directory, or its name in runs/), or a Hugging Face
config.json or its directory"""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options; one that is not given is None."""
    parser.description = DESCRIPTION
    add_consent(parser)
    add = parser.add_argument
    add("config", metavar="CONFIG", help=CONFIG_HELP)
    add("--world", type=whole(1), metavar="N", help="ranks, a device each (workers of the configuration)")
    add("--ep", type=whole(1), metavar="N", help="ranks that share one set of experts (as configured; else all ranks)")
    add("--ranks-per-node", type=whole(1), metavar="N", help="neighbouring ranks of one machine (8, or all if fewer)")
    add("--exchange", choices=BACKENDS.choices, help="what travels (as configured)")
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
    again = ("none", "attention", "experts", "full")
    add("--recompute", nargs="?", const="full", choices=again, help="what backward computes again; alone: full")
    add("--shard", choices=("none", "optimizer", "full"), help="states that ranks divide among them (as configured)")
    add("--replicate", type=whole(1), metavar="N", help="groups of ranks with all sharded states each (as configured)")
    add("--optimizer", metavar="NAME", help="adamw, adamw_bf16, muon or your own, for its state (as configured)")
    add("--offload", choices=("none", "states"), help="what of the optimizer lies in host memory (as configured)")
    add("--mtp", type=int, choices=(0, 1), help="layers for multi-token prediction (as configured; of config.json 0)")
    add("--fit", action="store_true", help="search for settings, and without --world for ranks, that fit")
    add("--memory-gib", type=number(0.01, 1e6), default=80, metavar="GIB", help="memory of a device (%(default)s)")
    add("--json", action="store_true", help="print the plan as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan that these options ask for. Returns 1 where a rank does not fit into its device."""
    import json

    from runtime.commands.plan.fit import fit_settings, smallest_world
    from runtime.commands.plan.plan import as_json, make_plan
    from runtime.commands.plan.subject import hugging_face_file, read_subject
    from runtime.commands.plan.table import print_fit, print_plan

    limit_bytes = options.memory_gib * 2**30
    searches = options.fit and options.world is None and hugging_face_file(options.config) is not None
    subject = smallest_world(options) if searches else read_subject(options)
    fit = fit_settings(subject, limit_bytes, ep_size=options.ep) if options.fit else None
    plan = fit.plan if fit else make_plan(subject)
    if options.json:
        found = {"options": fit.options, "tried": fit.tried} if fit else {}
        sys.stdout.write(json.dumps(as_json(plan, options.memory_gib) | found) + "\n")
    else:
        print_plan(plan, options.memory_gib)
        if fit is not None:
            print_fit(fit)
    return 0 if plan.peak_bytes <= limit_bytes else 1
