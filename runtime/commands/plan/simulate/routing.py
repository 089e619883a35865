"""How the rows of each layer are divided over the ranks of an expert-parallel group.

Shapes: L MoE layers, E experts, P ranks of the group. A factor is the rows of a rank over those of the rank that holds
most experts under balanced load, so that 1 is what `trimtab plan` plans with.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dispatch.errors import InvalidValue

Factors = NDArray[np.float64]
SEED = 0


def balanced(num_layers: int, experts_of_ranks: Sequence[int]) -> Factors:
    """Factors (L, P) where every expert gets the same load."""
    shares = np.array(experts_of_ranks, np.float64) / max(experts_of_ranks)
    return np.tile(shares, (num_layers, 1))


def factors_of_load(load_LE: NDArray[np.float64], experts_of_ranks: Sequence[int]) -> Factors:
    """Factors (L, P) from loads; neighbouring experts share a rank. A layer without load is taken as balanced."""
    sums = load_LE.sum(1, keepdims=True)
    relative_LE = np.where(sums > 0, load_LE * load_LE.shape[1] / np.maximum(sums, 1e-300), 1.0)
    starts = np.cumsum([0, *experts_of_ranks[:-1]])
    return np.add.reduceat(relative_LE, starts, axis=1) / max(experts_of_ranks)


def skewed(max_vio_L: Sequence[float], num_experts: int, top_k: int, experts_of_ranks: Sequence[int]) -> Factors:
    """Factors (L, P) of loads with this MaxVio in each layer; each layer has its own random order of the experts.

    Raises:
        InvalidValue: no load of top-k routing has such a MaxVio.
    """
    largest = num_experts / top_k - 1
    if wrong := [value for value in max_vio_L if not 0 <= value <= largest]:
        raise InvalidValue(
            f"--max-vio {wrong[0]:g} must be between 0 and {largest:g}: of {num_experts} experts, with top-{top_k}, "
            "none can get more than every token; give less"
        )
    profiles = {value: log_normal_load(value, num_experts) for value in set(max_vio_L)}
    orders = [np.random.default_rng((SEED, layer)).permutation(num_experts) for layer in range(len(max_vio_L))]
    load_LE = np.stack([profiles[value][order] for value, order in zip(max_vio_L, orders, strict=True)])
    return factors_of_load(load_LE, experts_of_ranks)


def log_normal_load(max_vio: float, num_experts: int) -> NDArray[np.float64]:
    """A load (E,), ascending, of mean 1: quantiles of the log-normal distribution whose largest is 1 + max_vio.

    Loads of routers without balancing look so: a few hot experts, many cold ones (docs/laws.md). A single hot expert
    among equal ones would cost less, all hot ones on one rank more.
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((each + 0.5) / num_experts) for each in range(num_experts)])

    def load(spread: float) -> NDArray[np.float64]:
        weights = np.exp(spread * (quantiles - quantiles[-1]))
        return np.asarray(num_experts * weights / weights.sum(), np.float64)

    low, high = 0.0, 1.0
    while load(high)[-1] < 1 + max_vio and high < 2**20:
        high *= 2
    for _ in range(60):  # bisection, to more than the 53 bits of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if load(middle)[-1] < 1 + max_vio else (low, middle)
    return load(low)
