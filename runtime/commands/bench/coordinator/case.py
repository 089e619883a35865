"""What `trimtab bench coordinator` measures, and how large its messages are.

Shapes: M counts of a law over all layers, W ranks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dispatch.errors import InvalidValue
from dispatch.laws import BalanceConfig, Law
from dispatch.layout import LoadLayout
from workers.control.wire import MAX_EXPERTS_TOTAL, BiasUpdate, encode

MODELLED = tuple(2**power for power in range(1, 12))  # 2 to 2,048 ranks
NUM_SUMS = 4  # assignments that were routed, sent, received, returned: a training step sums them with the counts
_SLOT_BYTES = 32  # of each rank in the summed vector: step, version and two checksums
_REPORT_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class ControlCase:
    """What to measure. rounds: the number of samples of each figure."""

    layers: int
    experts: int
    law: str
    workers: int
    rounds: int

    def __post_init__(self) -> None:
        if self.layers * self.experts > MAX_EXPERTS_TOTAL:
            raise InvalidValue(
                f"--layers ({self.layers}) x --experts ({self.experts}) must be at most {MAX_EXPERTS_TOTAL} together"
            )
        BalanceConfig(law=self.law)  # refuses an unknown one

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """World sizes of the measured rounds: powers of two, and all workers."""
        powers = [2**power for power in range(self.workers.bit_length()) if 2**power < self.workers]
        return (*powers, self.workers)

    def make_law(self) -> Law:
        """Build the law with its default settings, for layers of equal size."""
        names = tuple(f"layers.{layer}" for layer in range(self.layers))
        layout = LoadLayout(names, (self.experts,) * self.layers, (True,) * self.layers)
        return Law(BalanceConfig(law=self.law), layout)

    def with_law(self, law: str) -> "ControlCase":
        """Return this case with another law, and with fewer layers if its report would exceed 16 MiB."""
        other = replace(self, law=law)
        layer_bytes = 8 * other.make_law().num_counts // self.layers
        return replace(other, layers=max(1, min(self.layers, _REPORT_LIMIT_BYTES // layer_bytes)))


def summed_bytes(law: Law, world_size: int) -> int:
    """Bytes that the ranks sum in a step.

    8 bytes each for a count of the law, a sum, the request to stop, the loss, and the maximum of a layer; and 32 for
    each rank.
    """
    return 8 * (law.num_counts + NUM_SUMS + 2 + len(law.layout.names)) + _SLOT_BYTES * world_size


def update_bytes(law: Law) -> int:
    """Bytes of the coordinator's answer, which rank 0 broadcasts as it is."""
    return len(encode(BiasUpdate(step=1, version=1, state=law.initial_state())))


def counts_of(law: Law, step: int) -> Tensor:
    """Make random counts like those of a step: int64 (M,), a few thousand each."""
    return torch.randint(0, 4096, (law.num_counts,), generator=torch.Generator().manual_seed(step))
