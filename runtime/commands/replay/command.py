"""`trimtab replay RUN`."""

import argparse
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import add_run, float_in, folder_to_write, int_from, positive, run_of

HELP = "Compute a run's bias again, and try other laws on the router scores that it recorded."
EVERY = 10  # steps between placements of copies


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_run(parser)
    add = parser.add_argument
    add(
        "--law",
        action="append",
        default=[],
        metavar="SPEC",
        help="law to try beside the run's own, as newton or sign:u=0.003; again for more (sign:u=0.001 and adaptive)",
    )
    add("--threshold", type=float_in(0, 1e6), help="MaxVio_batch that counts as balance (1.5 x the practical floor)")
    add(
        "--shift",
        type=positive,
        metavar="STEP",
        help="training step from which the text is another (as in data.shift_at)",
    )
    add(
        "--first",
        type=positive,
        metavar="STEP",
        help="training step at which the laws begin, without bias (the first)",
    )
    add(
        "--copies",
        action="append",
        default=[],
        type=positive,
        metavar="N",
        help="say what up to N copies of hot experts on each rank would have taken off the busiest; again for more",
    )
    add("--ranks", type=int_from(2), metavar="N", help="ranks that share the experts, for --copies (as in the run)")
    add("--every", type=positive, metavar="STEPS", help=f"steps between placements, for --copies ({EVERY})")
    add("--out", type=folder_to_write, metavar="DIR", help="folder of replay.json and replay.png (the run's)")


def run(options: argparse.Namespace) -> int:
    """Replay and return the exit code."""
    run_dir = run_of(options)
    if not options.copies and (options.ranks or options.every):
        raise InvalidValue("--ranks and --every say how --copies are placed; add --copies N, or leave them out")
    from runtime.commands.replay.replay import replay

    if options.copies:
        _say_copies(run_dir, options)
    return replay(
        run_dir,
        laws=options.law,
        threshold=options.threshold,
        shift=options.shift,
        first=options.first,
        out=options.out,
    )


def _say_copies(run_dir: Path, options: argparse.Namespace) -> None:
    from rich.console import Console

    from runtime.commands.replay.copies import copies_table

    table = copies_table(run_dir, options.copies, ep_size=options.ranks, every=options.every or EVERY)
    Console(highlight=False).print(table)
