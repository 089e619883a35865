"""Balancing laws: pure functions from the load of one step and a small state to the next bias. See docs/laws.md.

Begin with a rule in `rules`, such as `sign`, the published one: it says what a law does to one layer. `register_law`
there registers a rule of your own. `law` applies the configured rule to all layers and holds its settings and state.
`load_metrics` measures how even a load is. A law never sees tokens, ranks or gradients. The same load and state give
the same bits in any world size and reduction order: counts are int64, means are exact (`math.fsum`), and every result
is rounded to fp32 once.
"""

from dispatch.laws.law import BalanceConfig, Law, LawState
from dispatch.laws.rules import LAWS, STATISTIC_SCALE, LawEntry, LayerLoad, LayerState, register_law

__all__ = [
    "BalanceConfig",
    "LAWS",
    "Law",
    "LawEntry",
    "LawState",
    "LayerLoad",
    "LayerState",
    "STATISTIC_SCALE",
    "register_law",
]
