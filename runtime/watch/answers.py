"""The numbers that the charts draw, as JSON has them: for the server's answers, and for the report."""

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
    """Curves by name, each as its least, greatest and mean value in every span of steps. spans: of these names."""
    each = {
        name: {"low": _column(spans.low, n), "high": _column(spans.high, n), "mean": _column(spans.mean, n)}
        for n, name in enumerate(names)
    }
    return {"first": spans.first.tolist(), "last": spans.last.tolist(), "curves": each}


def load_map(found: LoadColumns) -> dict[str, Any]:
    """The load of a layer as a heat map: a code for each expert of each span of steps."""
    how = {"num_records": found.num_records, "num_read": found.num_read}
    return {"steps": found.steps.tolist(), "codes": encoded(codes_of(shares_of(found))), **how}


def expert_curves(found: LoadColumns, expert: int) -> dict[str, Any]:
    """Load, as a multiple of the mean of the layer, and bias of one expert."""
    bias = [finite(value) for value in found.bias[:, expert].tolist()]
    return {"steps": found.steps.tolist(), "load": shares_of(found)[:, expert].round(4).tolist(), "bias": bias}


def last_load(run: WatchedRun, until: int | None = None) -> dict[str, Any] | None:
    """The load of all layers over the last steps, up to a step where one is given; None where there is none.

    A row of codes for each layer, and the experts that stand out.
    """
    found, layout = run.load.last(until), run.load.layout
    if found is None or layout is None:
        return None
    layers = []
    for where in layout.slices:
        counts_E, bias_E = found.counts_N[where], found.bias_N[where]
        share_E = counts_E / max(float(counts_E.mean()), 1e-9)
        layers.append({
            "codes": encoded(codes_of(share_E)),
            "max_vio": finite(float(share_E.max() - 1)),
            "dead": int((counts_E == 0).sum()),
            "bias": [finite(float(bias_E.min())), finite(float(bias_E.max()))],
        })  # fmt: skip
    how = {"first": found.first, "last": found.last, "num": found.num}
    return {**how, "layers": layers, **most_and_least(found, layout)}


def shares_of(found: LoadColumns) -> NDArray[np.float64]:
    """(C, E): load as a multiple of the mean of the layer."""
    shares: NDArray[np.float64] = found.counts / np.maximum(found.counts.mean(1, keepdims=True), 1e-9)
    return shares


def encoded(values: NDArray[Any]) -> str:
    """The bytes of an array as text."""
    return base64.b64encode(values.tobytes()).decode()


def finite(value: float) -> float | None:
    """The number, or None where it is none."""
    # Seven digits are more than a chart shows; the mean of a thousand steps would have seventeen.
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _column(values: NDArray[np.float64], number: int) -> list[float | None]:
    return [finite(value) for value in values[:, number].tolist()]
