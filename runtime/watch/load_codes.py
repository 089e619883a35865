"""Loads as bytes, for the colours of a heat map. E experts."""

import numpy as np
from numpy.typing import NDArray

from dispatch.layout import LoadLayout
from runtime.watch.load_file import LastLoad

LOAD_RANGE = 4.0  # colours saturate at a quarter and at four times the mean load, as in the report
NUM_NAMED = 8


def codes_of(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """0 for no load at all; else 1 to 255 for a quarter to four times the mean, on a scale of logarithms."""
    with np.errstate(divide="ignore"):
        height = np.log2(shares) / np.log2(LOAD_RANGE)  # -1 to 1
    codes = 128 + np.round(127 * np.clip(height, -1, 1))
    return np.where(shares > 0, codes, 0).astype(np.uint8)


def most_and_least(found: LastLoad, layout: LoadLayout) -> dict[str, list[dict[str, float | int]]]:
    """The experts with the most and with the least load of all layers, against the mean of their layer."""
    shares = np.concatenate([
        found.counts_N[where] / max(float(found.counts_N[where].mean()), 1e-9) for where in layout.slices
    ])  # fmt: skip
    layer_of = np.repeat(np.arange(len(layout.names)), layout.num_experts)
    starts = np.array([where.start for where in layout.slices])
    order = np.argsort(shares, kind="stable")

    def named(places: NDArray[np.int64]) -> list[dict[str, float | int]]:
        return [
            {"layer": int(layer_of[n]), "expert": int(n - starts[layer_of[n]]), "load": round(float(shares[n]), 4)}
            for n in places
        ]

    return {"most": named(order[::-1][:NUM_NAMED]), "least": named(order[:NUM_NAMED])}
