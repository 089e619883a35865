"""The options of `trimtab chaos`. Imports neither torch nor Ray: `--help` stays quick."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.chaos.kinds import KINDS
from runtime.chaos.namespaces import why_not
from runtime.chaos.plan import PRESETS, Preset
from runtime.option_types import number, whole


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """A command line of `trimtab chaos`. command: as it was given. keep: leave copies of the runs in `out`."""

    name: str
    preset: Preset
    seed: int
    out: Path
    keep: bool
    command: str


def parse_options(arguments: Sequence[str]) -> ChaosOptions:
    """Read the command line.

    Raises:
        SystemExit: --help was asked for and answered, or an option is wrong.
        ValueError: sizes that no plan can have, or a system without network namespaces.
    """
    given = _parser().parse_args(list(arguments))
    changes = {
        "num_faults": given.faults,
        "num_machines": given.machines,
        "workers_per_machine": given.workers_per_machine,
        "minutes": given.minutes,
    }
    preset = replace(PRESETS[given.preset], **{name: value for name, value in changes.items() if value is not None})
    if (reason := why_not()) is not None:
        raise InvalidValue(reason)
    command = shlex.join(["trimtab", "chaos", *arguments])
    return ChaosOptions(
        name=given.preset, preset=preset, seed=given.seed, out=given.out, keep=given.keep, command=command
    )


def _parser() -> argparse.ArgumentParser:
    sizes = "\n".join(
        f"  {name:6} {each.num_faults} faults of {len(each.kinds)} kinds, {each.num_machines} machines with "
        f"{each.workers_per_machine} workers each, {each.minutes:g} min at most"
        for name, each in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="trimtab chaos",
        description="Train on several machines of network namespaces here (needs root), strike the run by a seeded "
        "plan, and compare it with an undisturbed one.",
        epilog=f"presets:\n{sizes}\n\nfaults: {', '.join(KINDS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("preset", metavar="PRESET", choices=PRESETS, help="see below")
    add("--seed", type=whole(0), default=0, help="of the plan and of the run (%(default)s)")
    add("--faults", type=whole(1), help="their number (that of the preset)")
    add("--machines", type=whole(2), help="machines; the first is the head and runs the driver")
    add("--workers-per-machine", type=whole(1), help="expert workers of each")
    add("--minutes", type=number(1, 1440), help="longest duration of all of it")
    add("--out", type=Path, default=Path("runs/chaos"), help="folder of chaos.md, .json and .png (%(default)s)")
    add("--keep", action="store_true", help="copy both run directories and what they printed to OUT/kept")
    return parser
