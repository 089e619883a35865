"""A model of the control path for more ranks than fit: measured hops times their number. Pure; knows no torch.

The time of a step is that of one rank alone, as measured with the coordinator's answer, plus hops: the all-reduce over
W ranks in one of two ways, then the broadcast over a binomial tree of ceil(log2 W) hops. The two ways:

- tree: `tree_all_reduce` of `workers.control.wire`, which runs: ceil(log2 W) hops up a binomial tree and as many down,
  with all bytes each.
- ring: gloo's all-reduce, beside it: 2 (W - 1) hops with one W-th of the bytes each.

All hops are taken to be alike, as quick as one between two otherwise idle ranks of this machine, and hops of different
ranks at one level to be truly side by side. A machine with more ranks than cores is slower than that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HopCost:
    """Seconds of one hop: alpha_s + beta_s * bytes."""

    alpha_s: float
    beta_s: float

    @classmethod
    def fit(cls, samples: Mapping[int, list[float]]) -> "HopCost":
        """Least squares of relative errors over the medians by number of bytes."""
        sizes = np.array(list(samples), dtype=np.float64)
        medians = np.array([np.median(seconds) for seconds in samples.values()])
        # Relative errors: absolute ones would leave the latency to the noise of the largest messages.
        design = np.stack([np.ones_like(sizes), sizes], axis=1) / medians[:, None]
        (alpha_s, beta_s), *_ = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)
        return cls(max(float(alpha_s), 0.0), max(float(beta_s), 0.0))

    def seconds(self, num_bytes: float) -> float:
        """Seconds of one message."""
        return self.alpha_s + self.beta_s * num_bytes


@dataclass(frozen=True)
class Modelled:
    """A step at one world size. *_s: seconds from counts to bias. sent_bytes: mean of the ranks, the same both ways."""

    world_size: int
    tree_s: float
    ring_s: float
    sent_bytes: float


def model(world_size: int, hop: HopCost, alone_s: float, summed_bytes: int, update_bytes: int) -> Modelled:
    """Model a step at one world size. alone_s: a step of one rank. summed_bytes: of the vector that is all-reduced."""
    depth, others = math.ceil(math.log2(world_size)), (world_size - 1) / world_size
    after_s = alone_s + depth * hop.seconds(update_bytes)
    return Modelled(
        world_size=world_size,
        tree_s=2 * depth * hop.seconds(summed_bytes) + after_s,
        ring_s=2 * (world_size - 1) * hop.seconds(summed_bytes / world_size) + after_s,
        sent_bytes=others * (2 * summed_bytes + update_bytes),
    )
