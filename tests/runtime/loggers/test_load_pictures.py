import io

import matplotlib.image
import numpy as np

from runtime.loggers.load_pictures import BAR_ENDS, heat_map, histogram


def test_a_histogram_counts_every_expert_in_the_bar_that_its_load_falls_into() -> None:
    shares_E = np.array([0.0, 0.0, 1.0, 1.1, 2.0, 100.0])
    found = histogram(shares_E)
    ends = np.minimum(BAR_ENDS, 100.0)
    slow = [sum(low < share <= high for share in shares_E) for low, high in zip([-1.0, *ends], ends, strict=False)]
    assert found["bucket"] == slow and found["bucket"][0] == 2 and sum(slow) == 6
    assert (found["min"], found["max"], found["num"]) == (0.0, 100.0, 6.0)
    assert found["bucket_limit"][-1] == 100.0


def test_a_heat_map_has_a_row_for_each_layer_and_shows_dead_experts() -> None:
    layers = [np.array([0.0, 1.0, 4.0, 0.25]), np.array([1.0, 1.0])]
    width, height, png = heat_map(layers)
    pixels = np.round(matplotlib.image.imread(io.BytesIO(png)) * 255).astype(int)
    assert pixels.shape == (height, width, 3) == (32, 64, 3)
    cells = [[tuple(pixels[16 * row + 8, 16 * column + 8]) for column in range(4)] for row in range(2)]
    dead, mean, more, less = (209, 0, 165), (244, 244, 242), (170, 28, 40), (22, 84, 158)
    assert cells == [[dead, mean, more, less], [mean, mean, (255, 255, 255), (255, 255, 255)]]


def test_a_wide_heat_map_stays_narrow_enough_to_be_sent() -> None:
    width, height, png = heat_map([np.ones(2_000)] * 3)
    assert (width, height) == (2_000, 3) and len(png) < 1_000
