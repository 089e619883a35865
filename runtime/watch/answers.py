"""The numbers that the charts draw, as values for JSON: for the server's answers, and for the report."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.watch.buckets import Spans
from runtime.watch.load_codes import codes_of, most_and_least
from runtime.watch.load_file import LoadColumns
from runtime.watch.watched_run import WatchedRun


def curves_of(spans: Spans, names: Sequence[str]) -> dict[str, Any]:
    """Curves by name: the least, greatest and mean value in every span of steps. spans: with a column for each name."""
    each = {
        name: {kind: finite_values(getattr(spans, kind)[:, index]) for kind in ("low", "high", "mean")}
        for index, name in enumerate(names)
    }
    return {"first": spans.first.tolist(), "last": spans.last.tolist(), "curves": each}


def load_map(found: LoadColumns) -> dict[str, Any]:
    """The load of a layer as a heat map: a code for each expert of each span of steps."""
    read = {"num_records": found.num_records, "num_read": found.num_read}
    return {"steps": found.steps.tolist(), "codes": encoded(codes_of(shares_of(found))), **read}


def expert_curves(found: LoadColumns, expert: int) -> dict[str, Any]:
    """Load, as a multiple of the mean of the layer, and bias of one expert."""
    bias, load = finite_values(found.bias[:, expert]), shares_of(found)[:, expert].round(4).tolist()
    return {"steps": found.steps.tolist(), "load": load, "bias": bias}


def last_load(run: WatchedRun, until: int | None = None) -> dict[str, Any] | None:
    """The load of all layers over the last records, up to step `until` if it is given; None if there are none.

    It holds a row of codes for each layer, and the experts with the most and the least load.
    """
    found, layout = run.load.last(until), run.load.layout
    if found is None or layout is None:
        return None
    layers = []
    for where, share_E in zip(layout.slices, found.shares(layout), strict=True):
        bias_E = found.bias_N[where]
        layers.append({
            "codes": encoded(codes_of(share_E)),
            "max_vio": finite(float(share_E.max() - 1)),
            "dead": int((share_E == 0).sum()),
            "bias": [finite(float(bias_E.min())), finite(float(bias_E.max()))],
        })  # fmt: skip
    span = {"first": found.first, "last": found.last, "num": found.num}
    return {**span, "layers": layers, **most_and_least(found, layout)}


def shares_of(found: LoadColumns) -> NDArray[np.float64]:
    """(C, E): load as a multiple of the mean of the layer; 0 where the layer has no load."""
    shares: NDArray[np.float64] = found.counts / np.maximum(found.counts.mean(1, keepdims=True), 1e-9)
    return shares


def encoded(values: NDArray[Any]) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(values.tobytes()).decode()


def finite(value: float) -> float | None:
    """The number rounded to seven digits, or None for NaN and infinity, which JSON lacks."""
    # Seven digits are more than a chart shows. Unrounded, a mean has seventeen: answers would be twice as long.
    return float(f"{value:.7g}") if math.isfinite(value) else None


def finite_values(values: NDArray[Any]) -> list[float | None]:
    """`finite` of each value."""
    return [finite(value) for value in values.tolist()]
