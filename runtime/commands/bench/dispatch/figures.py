"""From samples to the figures of table and picture: medians over rounds, ratios taken inside a round."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dispatch.diagnosis.activity import MOE_PHASES
from runtime.commands.bench.dispatch.layer_run import Sample
from runtime.commands.bench.dispatch.turns import EXCHANGE, LAYER, MATMULS, DtypeSamples

Combine = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Pair:
    """A figure of the layer, the same figure of the bare limit, and their ratio."""

    measured: float
    bare: float
    ratio: float


@dataclass(frozen=True)
class LayerFigures:
    """One dtype. Times are those of the slowest rank; phases, CPU time, rates and bytes are the mean of the ranks.

    phases: seconds of dispatch, experts, combine and rest, which sum to wall.measured. wall, cpu: seconds, and those of
    the bare matmuls. flops: FLOP/s of a rank in the experts phase, and of the bare matmuls. exchange: seconds of
    dispatch and combine, and of the bare all-to-alls; bandwidth: bytes/s that a rank sends in both; None where nothing
    travels. wire_share: time of the bare all-to-alls over the step's. sent, floor: bytes of a rank by kind of link, and
    the least that there could be (`routes`). others: seconds of the compared schedules, and of the layer.
    """

    phases: dict[str, float]
    wall: Pair
    cpu: Pair
    flops: Pair
    exchange: Pair | None
    bandwidth: Pair | None
    wire_share: float
    sent: dict[str, float]
    floor: dict[str, float]
    busiest_over_mean: float
    allocated_bytes: int
    resident_bytes: int | None
    others: dict[str, Pair]

    @property
    def limits(self) -> dict[str, float]:
        """Seconds of the bare matmuls and the bare all-to-all."""
        return {MATMULS: self.wall.bare, EXCHANGE: self.exchange.bare if self.exchange else 0.0}

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the step: bare matmuls, bare all-to-alls, and the rest."""
        matmul = 1 / self.wall.ratio
        return {"matmul": matmul, "wire": self.wire_share, "rest": 1 - matmul - self.wire_share}

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return asdict(self) | {"shares": self.shares}


def figures_of(measured: DtypeSamples) -> LayerFigures:
    """All figures of one dtype."""
    layer, matmuls = (_Rounds(measured.samples[name]) for name in (LAYER, MATMULS))
    wall = _pair(layer.by_round("wall_s", max), matmuls.by_round("wall_s", max))
    phases = {phase: statistics.median(layer.by_round(f"{phase}_s")) for phase in MOE_PHASES}
    return LayerFigures(
        phases={**phases, "rest": wall.measured - sum(phases.values())},
        wall=wall,
        cpu=_pair(layer.by_round("cpu_s"), matmuls.by_round("cpu_s")),
        flops=_pair(layer.rate("flops", "experts_s"), matmuls.rate("flops", "wall_s")),
        **_exchange_figures(measured, layer),
        sent={link: statistics.median(layer.by_round(f"{link}_bytes")) for link in ("node", "network")},
        floor={link: statistics.median(layer.by_round(f"floor_{link}_bytes")) for link in ("all", "network")},
        busiest_over_mean=statistics.median(layer.by_round("busiest_over_mean")),
        allocated_bytes=measured.allocated_bytes,
        resident_bytes=measured.resident_bytes,
        others={
            name: _pair(_Rounds(samples).by_round("wall_s", max), layer.by_round("wall_s", max))
            for name, samples in measured.samples.items()
            if name not in (LAYER, MATMULS, EXCHANGE)
        },
    )


def _exchange_figures(measured: DtypeSamples, layer: "_Rounds") -> dict[str, Any]:
    if EXCHANGE not in measured.samples:
        return {"exchange": None, "bandwidth": None, "wire_share": 0.0}
    bare = _Rounds(measured.samples[EXCHANGE])
    seconds = _sums(layer.by_round("dispatch_s"), layer.by_round("combine_s"))
    num_bytes = _sums(layer.by_round("node_bytes"), layer.by_round("network_bytes"))
    bandwidth = [sent / time for sent, time in zip(num_bytes, seconds, strict=True)]
    return {
        "exchange": _pair(seconds, bare.by_round("wall_s", max)),
        "bandwidth": _pair(bandwidth, bare.rate("bytes", "wall_s")),
        "wire_share": _pair(bare.by_round("wall_s", max), layer.by_round("wall_s", max)).ratio,
    }


@dataclass(frozen=True)
class _Rounds:
    """The samples of one candidate, by rank and round."""

    by_rank: list[list[Sample]]

    def by_round(self, field: str, combine: Combine = statistics.fmean) -> list[float]:
        """Combine the ranks: one value for each round."""
        return [combine(sample[field] for sample in ranks) for ranks in zip(*self.by_rank, strict=True)]

    def rate(self, amount: str, seconds: str) -> list[float]:
        """Amount over seconds of all ranks, round by round."""
        return [number / time for number, time in zip(self.by_round(amount), self.by_round(seconds), strict=True)]


def _sums(first: list[float], second: list[float]) -> list[float]:
    return [sum(both) for both in zip(first, second, strict=True)]


def _pair(measured: list[float], bare: list[float]) -> Pair:
    # Where all tokens stay on their rank no byte is sent: 0 over 0.
    ratios = [value / limit if limit else 0.0 for value, limit in zip(measured, bare, strict=True)]
    return Pair(*map(statistics.median, (measured, bare, ratios)))
