"""Loads as one byte each, for the colours of a heat map."""

import numpy as np
from numpy.typing import NDArray

from dispatch.layout import LoadLayout
from runtime.watch.load_file import LastLoad

LOAD_RANGE = 4.0  # colours saturate at a quarter and at four times the mean load, as in the report
NUM_NAMED = 8  # experts in each list of `most_and_least`


def codes_of(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Codes of loads: 0 for no load; else 1 to 255 for a quarter to four times the mean, on a logarithmic scale.

    shares: of any shape, load over the mean load of the layer.
    """
    with np.errstate(divide="ignore"):
        height = np.log2(shares) / np.log2(LOAD_RANGE)  # -1 to 1
    codes = 128 + np.round(127 * np.clip(height, -1, 1))
    return np.where(shares > 0, codes, 0).astype(np.uint8)


def most_and_least(found: LastLoad, layout: LoadLayout) -> dict[str, list[dict[str, float | int]]]:
    """The experts of all layers with the most and with the least load, over the mean of their layer."""
    shares = np.concatenate(found.shares(layout))
    layer_of = np.repeat(np.arange(len(layout.names)), layout.num_experts)
    starts = np.array([where.start for where in layout.slices])
    order = np.argsort(shares, kind="stable")

    def named(indices: NDArray[np.int64]) -> list[dict[str, float | int]]:
        return [
            {"layer": int(layer_of[n]), "expert": int(n - starts[layer_of[n]]), "load": round(float(shares[n]), 4)}
            for n in indices
        ]

    return {"most": named(order[::-1][:NUM_NAMED]), "least": named(order[:NUM_NAMED])}
