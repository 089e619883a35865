"""Check and measure one CUDA device: a page with the goals and whether they are met, and the figures as JSON.

    python -m benchmarks.gpu [--only layer training ...] [--small] [--out docs/results] [--scratch DIR]

Page and JSON are written anew whenever a section knows more, so that an interruption loses nothing that was measured.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu.page import page
from benchmarks.gpu.process import Outcome, interrupt, run_section
from benchmarks.gpu.section import SECTIONS, Figures
from benchmarks.gpu.sizes import FULL, SMALL
from workers.record.atomic_file import write_atomically


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when all was measured and every check passed, 130 after Ctrl-C; leaves with 2 on wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device; torch {torch.__version__} sees none on this machine")
    given.out.mkdir(parents=True, exist_ok=True)
    found: Figures = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *arguments]),
        "small": given.small,
        "seconds": 0.0,
        "sections": {},
    }
    signal.signal(signal.SIGTERM, interrupt)
    try:
        _measure(found, given)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; what there is: {given.out / 'gpu.md'}\n")
        return 130
    sys.stdout.write(page(found))
    return 0 if _is_well(found) else 1


def _measure(found: Figures, given: argparse.Namespace) -> None:
    began = time.monotonic()

    def keep(name: str, outcome: Outcome) -> None:
        found["seconds"], found["sections"][name] = time.monotonic() - began, asdict(outcome)
        write_atomically(given.out / "gpu.json", json.dumps(found, indent=1) + "\n")
        write_atomically(given.out / "gpu.md", page(found))

    for name in given.only or SECTIONS:
        _say(began, f"{name} ...")
        outcome = run_section(
            name,
            SMALL if given.small else FULL,
            given.scratch,
            lambda known: keep(name, known),  # noqa: B023
        )
        _say(began, f"{name}: {outcome.state} in {outcome.seconds:.0f} s {outcome.error}")


def _say(began: float, text: str) -> None:
    sys.stderr.write(f"[{time.monotonic() - began:5.0f} s] {text}\n")
    sys.stderr.flush()


def _is_well(found: Figures) -> bool:
    sections = found["sections"]
    checks = sections.get("checks", {}).get("figures", {})
    return all(outcome["state"] == "measured" for outcome in sections.values()) and all(
        check["passed"] for check in checks.values()
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and measure one CUDA device.")
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all)")
    add("--small", action="store_true", help="small sizes for a quick look; goals are not judged")
    add("--out", type=Path, default=Path("docs/results"), help="folder for gpu.md and gpu.json (%(default)s)")
    add("--scratch", type=Path, metavar="DIR", help="folder on the disk for runs and checkpoints, removed afterwards")
    return parser


if __name__ == "__main__":
    sys.exit(main())
