"""Prints the balance of each MoE layer in comparisons: MaxVio over the last tenth of the steps, for each method.

trimtab compare --laws none adaptive --out runs/adamw
trimtab compare --laws none adaptive --out runs/muon --optim.name muon --optim.lr 0.02
python -m benchmarks.balance_by_layer runs/adamw runs/muon
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paired import mean_and_deviation
from runtime.commands.compare.plan import ComparePlan
from workers.record.run_log import read_metrics


def figures_of(run_dir: Path) -> list[float]:
    """The mean MaxVio of a batch in the last tenth of the steps, for each layer; then the last held-out loss."""
    steps, evaluations = read_metrics(run_dir)
    last = [line["max_vio_batch_per_layer"] for line in steps[-max(1, len(steps) // 10) :]]
    return [*map(statistics.fmean, zip(*last, strict=True)), evaluations[-1]["val_loss"]]


def rows_of(plan: ComparePlan) -> dict[str, list[str]]:
    """The cells of each method's line, by method."""
    runs: dict[str, list[list[float]]] = {}
    for key in plan.runs:
        runs.setdefault(key.method.spec, []).append(figures_of(plan.run_dir(key)))
    optimizer = f"`{plan.base.optim.name}`, {plan.base.optim.lr:g}"
    return {
        spec: [f"`{spec}`", optimizer, *(mean_and_deviation(values, 3) for values in zip(*each, strict=True))]
        for spec, each in runs.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of some comparisons in Markdown, method by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="those of `trimtab compare --out`, of one and the same model"
    )
    found = [rows_of(ComparePlan.read(folder)) for folder in parser.parse_args(arguments).folders]
    lines = [each[method] for method in found[0] for each in found if method in each]
    layers = [f"layer {number}" for number in range(1, len(lines[0]) - 2)]
    for cells in (["law", "optimizer, rate", *layers, "held-out loss"], ["---"] * len(lines[0]), *lines):
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
