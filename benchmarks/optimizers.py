"""Tokens that each optimizer trains on until the held-out loss is at a target, on the small preset.

    python -m benchmarks.optimizers [--specs adamw muon muon:0.004] [--seeds 3] [--steps 400] [--loss 1.9] [--out DIR]

A spec is a value of optim.name, with a learning rate after a colon where it is not the preset's. Each run is one worker
in a process of its own. Runs follow each other, all specs with the first seed, then all with the next, so that a time
in which the machine is slow meets all specs. A run that --out has already is read and not trained again. Without --loss
the target is the highest last loss of all runs, which all of them reach. The tokens at the target are interpolated
between two evaluations.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import mean_and_deviation
from benchmarks.processes import run_processes
from runtime.job.launch import make_spec, open_ranks
from runtime.settings.config import TrainConfig
from runtime.settings.config_file import load_config, override
from workers.data.prepare import prepare_dataset
from workers.record.run_log import read_metrics

Curve = list[tuple[int, float]]  # tokens trained on, and the held-out loss then


def config_of(spec: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    """The settings of a run: those of the preset, with another optimizer and one worker."""
    name, _, lr = spec.partition(":")
    config = override(load_config("small"), [f"--optim.name={name}", *([f"--optim.lr={lr}"] if lr else [])])
    run = replace(
        config.run,
        steps=options.steps,
        seed=seed,
        eval_every=min(options.eval_every, options.steps),
        checkpoint_every=0,
        keep_checkpoints=1,
    )
    return replace(config, run=run, cluster=replace(config.cluster, num_workers=1))


def train(config: TrainConfig, run_dir: Path, num_threads: int, *_: int) -> None:
    """Train one run. A new process for each run: none finds memory or caches of another."""
    torch.set_num_threads(num_threads)
    run_dir.mkdir(parents=True)
    spec = make_spec(config, run_dir, prepare_dataset(config.data))
    with open_ranks(config.cluster, spec) as ranks:
        ranks.run("train", None, None)


def curve_of(run_dir: Path, config: TrainConfig) -> tuple[Curve, float]:
    """The held-out loss by tokens, and the median seconds of a step."""
    steps, evaluations = read_metrics(run_dir)
    step_tokens = config.run.global_batch_size * config.model.max_seq_len
    curve = [(line["step"] * step_tokens, line["val_loss"]) for line in evaluations]
    return curve, statistics.median(line["step_s"] for line in steps)


def tokens_to(curve: Curve, loss: float) -> float | None:
    """The tokens at which the curve first comes down to `loss`; None if it never does."""
    before: tuple[int, float] | None = None
    for tokens, value in curve:
        if value <= loss:
            if before is None:
                return float(tokens)
            share = (before[1] - loss) / (before[1] - value)  # the loss before was above `loss`
            return before[0] + share * (tokens - before[0])
        before = tokens, value
    return None


def table(found: dict[str, list[tuple[Curve, float]]], loss: float) -> list[str]:
    """Markdown: a line for each spec, over its seeds."""
    lines = [
        f"| optimizer | tokens to {loss:.4f} | of the first | last loss | seconds of a step |",
        "|---|---|---|---|---|",
    ]
    first: float | None = None
    for spec, runs in found.items():
        reached = [tokens_to(curve, loss) for curve, _ in runs]
        known = [each for each in reached if each is not None]
        mean = statistics.fmean(known) if len(known) == len(reached) else None
        first = mean if first is None else first
        tokens = "not by all seeds" if mean is None else f"{mean_and_deviation([each / 1e6 for each in known], 3)} M"
        ratio = "" if mean is None or not first else f"{mean / first:.2f}"
        last = mean_and_deviation([curve[-1][1] for curve, _ in runs], 4)
        lines.append(f"| `{spec}` | {tokens} | {ratio} | {last} | {statistics.median(each for _, each in runs):.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=["adamw", "muon"], metavar="NAME[:LR]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of a run (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=20, help="steps between evaluations (%(default)s)")
    parser.add_argument("--loss", type=float, help="held-out loss to come to, in nats a token")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a run (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the runs (one that is removed afterwards)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        found = _measure(options, options.out or Path(name))
    highest = max(curve[-1][1] for runs in found.values() for curve, _ in runs)
    print("\n".join(table(found, options.loss or highest)))
    return 0


def _measure(options: argparse.Namespace, out: Path) -> dict[str, list[tuple[Curve, float]]]:
    found: dict[str, list[Any]] = {spec: [] for spec in options.specs}
    for seed in range(options.seeds):
        for spec in options.specs:
            config, run_dir = config_of(spec, seed, options), out / spec.replace(":", "-") / f"seed_{seed}"
            if not run_dir.exists():
                run_processes(1, train, config, run_dir, options.threads)
            found[spec].append(curve_of(run_dir, config))
            print(f"{spec} seed {seed}: held-out loss {found[spec][-1][0][-1][1]:.4f}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
