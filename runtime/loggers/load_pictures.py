"""The load of the experts as pictures for TensorBoard: a histogram for each layer, and a heat map of all layers.

E experts of a layer; C columns, as many as the largest layer has experts.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image  # comes with matplotlib

from runtime.watch.load_codes import codes_of

# Upper ends of the histogram's bars, as multiples of the mean load: 0 for experts without a token, then a 16th to 32
# times the mean in quarters of a doubling, and the rest.
BAR_ENDS = np.array([0.0, *2.0 ** np.arange(-4, 5.25, 0.25), np.inf])
MAX_CELL, MAX_WIDTH = 16, 1_024  # pixels
# As in runtime/watch/static/heat.js: no token, far less than the mean, the mean, far more than it.
_DEAD, _LESS, _MEAN, _MORE = ((209, 0, 165), (22, 84, 158), (244, 244, 242), (170, 28, 40))
_NOTHING = 255  # white, where a layer has fewer experts than others


def histogram(shares_E: NDArray[np.float64]) -> dict[str, Any]:
    """The fields of TensorBoard's HistogramProto. shares_E: load of each expert over the mean of its layer."""
    counts = np.bincount(np.searchsorted(BAR_ENDS, shares_E), minlength=len(BAR_ENDS))
    most = float(shares_E.max())
    return {
        "min": float(shares_E.min()),
        "max": most,
        "num": float(len(shares_E)),
        "sum": float(shares_E.sum()),
        "sum_squares": float((shares_E**2).sum()),
        "bucket_limit": np.minimum(BAR_ENDS, max(most, 64.0)).tolist(),
        "bucket": counts.astype(float).tolist(),
    }


def heat_map(shares: Sequence[NDArray[np.float64]]) -> tuple[int, int, bytes]:
    """Width, height and PNG of a picture with a row for each layer and a cell for each expert. shares: by layer."""
    colours = _palette()
    pixels = np.full((len(shares), max(map(len, shares)), 3), _NOTHING, np.uint8)  # (layers, C, 3)
    for row, shares_E in enumerate(shares):
        pixels[row, : len(shares_E)] = colours[codes_of(shares_E)]
    cell = max(1, min(MAX_CELL, MAX_WIDTH // pixels.shape[1]))
    pixels = pixels.repeat(cell, 0).repeat(cell, 1)
    return pixels.shape[1], pixels.shape[0], _png(pixels)


def _palette() -> NDArray[np.uint8]:
    """(256, 3): the colour of each code of `codes_of`."""
    height = (np.arange(256) - 128) / 127
    weight = np.abs(height)[:, None] ** 0.8
    ends = np.where(height[:, None] < 0, _LESS, _MORE)
    colours = np.round(_MEAN + (ends - np.array(_MEAN)) * weight.clip(0, 1))
    colours[0] = _DEAD
    palette: NDArray[np.uint8] = colours.astype(np.uint8)
    return palette


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """An image (rows, columns, 3) as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
