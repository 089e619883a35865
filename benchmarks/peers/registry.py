"""Who takes part, and how each is found: a peer is imported only when it is asked for."""

import importlib
import importlib.metadata
from dataclasses import dataclass

from benchmarks.peers.case import LayerWeights
from benchmarks.peers.contestant import Contestant, Setting


@dataclass(frozen=True)
class Entrant:
    """One name in the race."""

    module: str
    """Where its `build` is."""
    distribution: str
    """What pip calls it."""

    @property
    def version(self) -> str:
        """Of the installed distribution; empty without one."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def __call__(self, setting: Setting, weights: LayerWeights) -> Contestant:
        """Build the layer; any error that this raises keeps it out of the race, with the reason reported."""
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
