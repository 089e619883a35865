"""`trimtab plan CONFIG`."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dispatch.errors import InvalidValue
from dispatch.exchange.registry import BACKENDS
from runtime.commands.command import CommandParser
from runtime.commands.options import float_in, folder_to_write, positive
from runtime.commands.out import out_dir
from runtime.settings.consent import add_consent

if TYPE_CHECKING:
    from runtime.commands.plan.subject import Subject

HELP = "Tell the memory of each rank and the bytes of a step before anything starts."

DESCRIPTION = """\
What a training run would need, told before anything starts: parameters, memory of each rank, and bytes that the
all-to-all exchanges put on the network and inside a node in a step. Loads are taken as balanced."""

CONFIG_HELP = """preset or YAML file of Trimtab, a run (its directory, or its name in runs/), or a Hugging Face
config.json or its directory"""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options. Settings that are not given are None: the configuration has them."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # else it would break "all-to-all"
    add_consent(parser)
    add = parser.add_argument
    add("config", metavar="CONFIG", help=CONFIG_HELP)
    add("--world", type=positive, metavar="N", help="ranks, a device each (workers of the configuration)")
    add("--ep", type=positive, metavar="N", help="ranks that share one set of experts (as configured; else all ranks)")
    add("--pp", type=positive, metavar="N", help="groups of ranks that the layers are divided over (as configured)")
    add("--ranks-per-node", type=positive, metavar="N", help="neighbouring ranks of one machine (8, or all if fewer)")
    add("--exchange", choices=BACKENDS.choices, help="what travels (as configured)")
    add(
        "--batch",
        type=positive,
        metavar="N",
        help="sequences of a step, over all ranks (as configured; else one a rank)",
    )
    add("--micro-batch", type=positive, metavar="N", help="sequences that a rank computes at once (as configured)")
    add(
        "--seq-len",
        type=positive,
        metavar="N",
        help="tokens of a sequence (as configured; of config.json at most 4096)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="number format of the computation (as configured; bfloat16)")
    again = ("none", "attention", "experts", "full")
    add("--recompute", nargs="?", const="full", choices=again, help="what backward computes again; alone: full")
    add("--shard", choices=("none", "optimizer", "full"), help="states that ranks divide among them (as configured)")
    add("--replicate", type=positive, metavar="N", help="groups of ranks with all sharded states each (as configured)")
    add("--context", type=positive, metavar="N", help="ranks that share each sequence (as configured)")
    add("--optimizer", metavar="NAME", help="adamw, adamw_bf16, muon or your own, for its state (as configured)")
    add("--offload", choices=("none", "states"), help="what of the optimizer lies in host memory (as configured)")
    add("--mtp", type=int, choices=(0, 1), help="layers for multi-token prediction (as configured; of config.json 0)")
    add("--fit", action="store_true", help="search for settings, and without --world for ranks, that fit")
    add("--memory-gib", type=float_in(0.01, 1e6), default=80, metavar="GIB", help="memory of a device (%(default)s)")
    add("--json", action="store_true", help="print the plan as JSON")
    _add_simulation(parser)


def _add_simulation(parser: CommandParser) -> None:
    group = parser.add_argument_group("simulation", "How long a step takes, and what imbalance costs.")
    group.add_argument(
        "--simulate", action="store_true", help="simulate a step, balanced and not, in place of the plan's tables"
    )
    defaults: dict[str, object] = {}

    def add(*names: str, **settings: Any) -> None:
        action = group.add_argument(*names, **settings)
        defaults[action.dest] = action.default

    add(
        "--hardware",
        default="h100",
        metavar="NAME",
        help="h100, h800, h200, b200, cpu, or a file of rates (%(default)s)",
    )
    add("--max-vio", type=float_in(0, 1e6), nargs="+", metavar="V", help="MaxVio of each layer (0 to 4)")
    add("--trace", metavar="RUN", help="a run with recorded scores (balance.record): replay laws on it")
    add(
        "--law",
        action="append",
        default=[],
        metavar="SPEC",
        help="law to replay; again for more (none, sign, adaptive)",
    )
    add("--worlds", type=positive, nargs="+", metavar="N", help="numbers of ranks to compare (8 to 16384)")
    add("--overlap", type=float_in(0, 1), default=0.0, help="share of computation that hides exchanges (%(default)s)")
    add("--bubble", type=float_in(0, 0.99), default=0.0, help="share of a step that pipeline stages wait (%(default)s)")
    add("--out", type=folder_to_write, metavar="DIR", help="folder to write simulation.json and simulation.png to")
    parser.set_defaults(simulation_defaults=defaults)


def run(options: argparse.Namespace) -> int:
    """Print the plan that these options ask for. Returns 1 where a rank does not fit into its device."""
    import json

    from runtime.commands.plan.fit import fit_settings, smallest_world
    from runtime.commands.plan.plan import as_json, make_plan
    from runtime.commands.plan.subject import hugging_face_file, read_subject
    from runtime.commands.plan.table import print_fit, print_plan

    _check_simulates(options)
    limit_bytes = options.memory_gib * 2**30
    searches = options.fit and options.world is None and hugging_face_file(options.config) is not None
    subject = smallest_world(options) if searches else read_subject(options)
    fit = fit_settings(subject, limit_bytes, ep_size=options.ep) if options.fit else None
    plan = fit.plan if fit else make_plan(subject)
    if options.simulate:
        _simulate(plan.subject, options)
        return 0 if plan.peak_bytes <= limit_bytes else 1
    if options.json:
        found = {"options": fit.options, "tried": fit.tried} if fit else {}
        sys.stdout.write(json.dumps(as_json(plan, options.memory_gib) | found) + "\n")
    else:
        print_plan(plan, options.memory_gib)
        if fit is not None:
            print_fit(fit)
    return 0 if plan.peak_bytes <= limit_bytes else 1


def _check_simulates(options: argparse.Namespace) -> None:
    given = [name for name, default in options.simulation_defaults.items() if getattr(options, name) != default]
    if given and not options.simulate:
        raise InvalidValue(
            f"--{given[0].replace('_', '-')} is an option of the simulation; add --simulate, or leave it out"
        )


def _simulate(subject: "Subject", options: argparse.Namespace) -> None:
    import json

    from runtime.commands.plan.simulate.report import as_json, simulate
    from runtime.commands.plan.simulate.table import print_report

    report = simulate(subject, options)
    values = as_json(report)
    if options.json:
        sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")
    else:
        print_report(report)
    if options.out:
        from runtime.commands.plan.simulate.chart import write_chart
        from runtime.commands.results import write_json

        out = out_dir(options.out)
        write_json(out / "simulation.json", values)
        write_chart(report, out / "simulation.png")
