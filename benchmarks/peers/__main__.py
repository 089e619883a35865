"""Race our MoE layer against those of other projects on CPU, forward and backward.

Each race runs in fresh processes of this machine, one for each rank, over gloo. Every layer gets the same weights and
tokens and is first checked against a plain fp32 loop. A layer that is not installed, or whose results are wrong, does
not race; the report says why. Progress goes to standard error, tables to standard output, everything to OUT.jsonl and
OUT.md.
"""

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.layer import SHAPES
from benchmarks.peers import machine, report
from benchmarks.peers.case import Case
from benchmarks.peers.launch import RaceFailed, race
from benchmarks.peers.registry import ENTRANTS


@dataclass(frozen=True)
class Output:
    """The files of results, written after each race, so that an interrupted run keeps what it has."""

    prefix: Path

    def begin(self, about: dict[str, str]) -> None:
        """Start both files anew."""
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file("jsonl").write_text("")
        self._file("md").write_text(f"{report.NOTE}\n\n{_one_line(about)}\n\n")

    def add(self, record: dict[str, object], markdown: str) -> None:
        """Append one race."""
        for suffix, text in (("jsonl", json.dumps(record)), ("md", markdown)):
            with self._file(suffix).open("a") as file:
                file.write(text + "\n")

    def _file(self, suffix: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.{suffix}")


def main() -> int:
    """Run the races that the arguments ask for; 1 if one of them gave no result."""
    arguments = parse(sys.argv[1:])
    about, versions, output = machine.describe(), machine.versions(arguments.peers), Output(arguments.out)
    output.begin(about)
    print(_one_line(about))
    cases, failed = cases_of(arguments), False
    for number, case in enumerate(cases, 1):
        _say(f"[{number}/{len(cases)}] {case.title}")
        try:
            result = race(case, arguments.peers, lambda text: _say(f"  {text}"))
        except RaceFailed as failure:
            failed = True
            _say(f"no result: {failure}")
            output.add({"case": asdict(case), "failed": str(failure)}, f"### {case.title}\n\nNo result.\n")
            continue
        outcome = report.outcome_from_json(result)
        record = {"case": asdict(case), "machine": about, "versions": versions, "summary": report.summary(outcome)}
        output.add(record | result, report.as_markdown(case, outcome, versions))
        print(f"\n{report.as_text(case, outcome, versions)}", flush=True)
    print(f"\n{report.NOTE}")
    return int(failed)


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make bench-peers ARGS=...", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lists = {
        "--shapes": (sorted(SHAPES), ["fine"], "sizes of the layer (default: fine)"),
        "--dtypes": (["float32", "bfloat16"], ["float32", "bfloat16"], "of activations and experts (default: both)"),
        "--skew": (["balanced", "skewed"], ["balanced"], "load; skewed: busiest expert 3.7 x mean (default: balanced)"),
        "--peers": (sorted(ENTRANTS), list(ENTRANTS), "who races (default: all)"),
        "--allocator": (
            sorted(machine.ALLOCATORS),
            ["default"],
            "glibc as it is, or tuned to keep memory (default: default)",
        ),
    }
    for flag, (choices, default, text) in lists.items():
        parser.add_argument(flag, nargs="+", choices=choices, default=default, help=text)
    parser.add_argument("--ep", nargs="+", type=int, default=[2], help="ranks that share the experts (default: 2)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="torch threads a rank (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each layer (default: 7)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-peers"), help="prefix of the two files")
    return parser.parse_args(words)


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Every combination, in the order given."""
    combinations = itertools.product(
        arguments.allocator, arguments.ep, arguments.threads, arguments.shapes, arguments.skew, arguments.dtypes
    )
    return [
        Case(
            shape_name=shape_name,
            shape=SHAPES[shape_name],
            dtype_name=dtype_name,
            ep_size=ep_size,
            skewed=skew == "skewed",
            threads=threads,
            allocator=allocator,
            rounds=arguments.rounds,
        )
        for allocator, ep_size, threads, shape_name, skew, dtype_name in combinations
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _one_line(about: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())


if __name__ == "__main__":
    sys.exit(main())
