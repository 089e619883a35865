"""Measure, model, show and write: the run of `trimtab bench coordinator`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from cluster.config import ClusterConfig
from cluster.gang.gang import Gang
from cluster.ray.session import RaySession
from runtime.commands.bench.coordinator.case import MODELLED, ControlCase, summed_bytes, update_bytes
from runtime.commands.bench.coordinator.load import RUN_ID, LoadFigures, measure_load, percentile
from runtime.commands.bench.coordinator.measurement import ACTOR, FUNCTION, ControlMeasurement
from runtime.commands.bench.coordinator.model import HopCost, Modelled, model
from runtime.commands.bench.coordinator.ranks import LIMIT_S, BenchRank, RankFigures
from runtime.commands.bench.coordinator.table import show
from runtime.commands.results import write_measurement
from runtime.job.coordinator import CoordinatorClient, CoordinatorPolicy, start_coordinator
from runtime.terminal.progress_line import ProgressLine

LOAD_LAWS = ("sign", "newton", "quantile")  # their statistics: none, one number an expert, a histogram an expert


def run_benchmark(case: ControlCase, out: Path) -> int:
    """Measure, print the tables, write samples and picture. Returns the exit code."""
    with ProgressLine(sys.stderr) as progress:
        measured = measure(case, progress)
    from runtime.commands.bench.coordinator.chart import write_chart  # matplotlib takes a second

    show(measured)
    write_measurement(out, asdict(measured), partial(write_chart, measured))
    return 0


def measure(case: ControlCase, progress: ProgressLine) -> ControlMeasurement:
    """Start a Ray, measure the coordinator under load, then the ranks, and end all that was started."""
    torch.set_num_threads(1)  # as the actor and the ranks have
    config = ClusterConfig(
        num_workers=case.workers,
        device="cpu",
        threads_per_worker=1,
        collective_timeout_s=LIMIT_S,
        start_timeout_s=300.0,
    )
    progress.show("starting Ray")
    with RaySession.open(config), _coordinator() as client:
        loads = _measure_loads(case, client, progress)
        progress.show(f"starting {case.workers} ranks")
        with Gang.launch(config, BenchRank) as gang:
            ranks = _measure_ranks(gang, case, client, progress)
    hop = HopCost.fit(ranks.hop_s) if ranks.hop_s else None
    alone_s = percentile(ranks.rounds[0].seconds, 50)
    return ControlMeasurement(case, loads, ranks, hop, _model(case, hop, alone_s) if hop else [])


@contextmanager
def _coordinator() -> Iterator[CoordinatorClient]:
    import ray

    actor = start_coordinator(RUN_ID)
    try:
        ray.get(actor.status.remote(), timeout=LIMIT_S)
        # Shorter than the timeout of collectives, so that a coordinator that does not answer is what is reported.
        yield CoordinatorClient(actor, LIMIT_S / 3)
    finally:
        ray.kill(actor)


def _measure_loads(case: ControlCase, client: CoordinatorClient, progress: ProgressLine) -> dict[str, LoadFigures]:
    names = list(dict.fromkeys((*LOAD_LAWS, case.law)))
    figures = {}
    # The largest reports first: a coordinator refuses reports larger than those of the laws that it has seen.
    for name in sorted(names, key=lambda name: -case.with_law(name).make_law().num_counts):
        small = case.with_law(name)
        progress.show(f"reports of law {name}, {small.layers} x {small.experts} experts")
        figures[name] = measure_load(small, {FUNCTION: CoordinatorPolicy().handle, ACTOR: client})
    return {name: figures[name] for name in names}


def _measure_ranks(gang: Gang, case: ControlCase, client: CoordinatorClient, progress: ProgressLine) -> RankFigures:
    said = ""

    def tell() -> None:
        nonlocal said
        if (doing := gang.control(0, "progress", timeout_s=30.0)) != said:
            said = doing
            progress.show(doing)

    figures, *_ = gang.run("measure", case, client, on_poll=tell)
    result: RankFigures = figures
    return result


def _model(case: ControlCase, hop: HopCost, alone_s: float) -> list[Modelled]:
    law = case.make_law()
    return [
        model(size, hop, alone_s, summed_bytes(law, size), update_bytes(law))
        for size in sorted({*MODELLED, *case.world_sizes} - {1})
    ]
