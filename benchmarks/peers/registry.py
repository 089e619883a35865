"""The layers that can take part. A peer is imported only when it is built."""

import importlib
import importlib.metadata
from dataclasses import dataclass

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting


@dataclass(frozen=True)
class Entrant:
    """One name in the race."""

    module: str
    """The module with its `build`."""
    distribution: str
    """Its name for pip."""

    @property
    def version(self) -> str:
        """The version of the installed distribution; empty if it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def __call__(self, setting: Setting, weights: LayerWeights) -> Contestant:
        """Build the layer. If this raises an error, the layer does not race, and the report says why."""
        contestant: Contestant = importlib.import_module(self.module).build(setting, weights)
        return contestant


ENTRANTS = {
    "trimtab": Entrant("benchmarks.peers.trimtab_peer", "trimtab"),
    "transformers": Entrant("benchmarks.peers.transformers_peer", "transformers"),
    "torchtitan": Entrant("benchmarks.peers.torchtitan_peer", "torchtitan"),
    "megatron": Entrant("benchmarks.peers.megatron_peer", "megatron-core"),
    "deepspeed": Entrant("benchmarks.peers.deepspeed_peer", "deepspeed"),
    "tutel": Entrant("benchmarks.peers.tutel_peer", "tutel"),
}
