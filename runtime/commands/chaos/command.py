"""`trimtab chaos PRESET`."""

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import float_in, folder_to_write, int_from, positive
from runtime.terminal.quantities import counted

if TYPE_CHECKING:
    from runtime.commands.chaos.plan import ChaosOptions

HELP = "Strike a run with faults by a plan, and see whether it comes through."

DESCRIPTION = """\
Train on several simulated machines here: network namespaces of this host, which needs root. Strike the run by a
seeded plan of faults, and compare it with an undisturbed run."""


def add_arguments(parser: CommandParser) -> None:
    """Declare the options. Sizes that are not given are None: the preset has them."""
    from runtime.commands.chaos.kinds import KINDS
    from runtime.commands.chaos.plan import PRESETS

    sizes = "\n".join(
        f"  {name:6} {each.num_faults} faults of {len(each.kinds)} kinds, {each.num_machines} machines with "
        f"{counted(each.workers_per_machine, 'worker')} each, {each.minutes:g} min at most"
        for name, each in PRESETS.items()
    )
    parser.description = DESCRIPTION
    faults = textwrap.fill(", ".join(KINDS), 100, initial_indent="  ", subsequent_indent="  ")
    parser.epilog = f"presets:\n{sizes}\n\nfaults:\n{faults}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("preset", metavar="PRESET", choices=PRESETS, help="see below")
    add("--seed", type=int_from(0), default=0, help="of the plan and of the run (%(default)s)")
    add("--faults", type=positive, help="their number (that of the preset)")
    add("--machines", type=int_from(2), help="machines; the first is the head and runs the driver")
    add("--workers-per-machine", type=positive, help="expert workers of each")
    add("--minutes", type=float_in(1, 1440), help="longest duration of all of it")
    add(
        "--out",
        type=folder_to_write,
        default=Path("runs/chaos"),
        help="folder of chaos.md, .json and .png (%(default)s)",
    )
    add("--keep", action="store_true", help="copy both run directories and what they printed to OUT/kept")


def run(options: argparse.Namespace) -> int:
    """Run a preset to its end or its limit and write the results. Returns 1 if anything was not as promised."""
    checked = checked_options(options)
    from runtime.commands.chaos.campaign import run_campaign

    return run_campaign(checked)


def checked_options(options: argparse.Namespace) -> "ChaosOptions":
    """The preset with the sizes that the command line changes, and the other options.

    Raises:
        InvalidValue: sizes that no plan can have, or a system without network namespaces.
    """
    from dataclasses import replace

    from runtime.commands.chaos.namespaces import why_not
    from runtime.commands.chaos.plan import PRESETS, ChaosOptions

    changes = {
        "num_faults": options.faults,
        "num_machines": options.machines,
        "workers_per_machine": options.workers_per_machine,
        "minutes": options.minutes,
    }
    preset = replace(PRESETS[options.preset], **{name: value for name, value in changes.items() if value is not None})
    if (reason := why_not()) is not None:
        raise InvalidValue(reason)
    return ChaosOptions(
        name=options.preset,
        preset=preset,
        seed=options.seed,
        out=options.out,
        keep=options.keep,
        command=options.command_line,
    )
