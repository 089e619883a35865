"""A law that balances nothing: it draws a random bias in every step, so that loads are ragged and some experts idle.

Shapes: E experts of one layer.
"""

import torch

from dispatch.laws import LayerLoad, LayerState, register_law

# Bias of scores in [0, 1]: from an even load to one in which a few experts have all tokens.
SCALES = (0.0, 0.02, 0.2, 5.0)


@register_law("ragged", rate=1.0, per_layer={"draws": 0.0})
def ragged(load: LayerLoad, state: LayerState, rate: float) -> LayerState:
    """A random bias of a random scale."""
    draws = state.extras["draws"] + 1
    # Seeded by the count of draws and this step's load, so that it is a pure function and layers differ.
    seed = int(draws) * 1_000_003 + int(load.tokens_E @ torch.arange(1, load.tokens_E.numel() + 1))
    generator = torch.Generator().manual_seed(seed)
    scale = SCALES[int(torch.randint(len(SCALES), (), generator=generator))]
    bias_E = scale * torch.randn(load.tokens_E.numel(), generator=generator, dtype=torch.float64)
    return state.moved_by(rate * bias_E - state.bias_E, draws=draws)
