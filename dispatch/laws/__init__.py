"""Balancing laws: pure functions from the load of one step and a small state to the next bias. See docs/laws.md.

A law never sees tokens, ranks or gradients. The same load and state give the same bits in any world size and reduction
order: counts are int64, means are exact (`math.fsum`), and every result is rounded to fp32 once.
"""

from dispatch.laws import rules as _rules  # registers the laws that come with us
from dispatch.laws.config import BalanceConfig
from dispatch.laws.law import Law, LawState, make_law
from dispatch.laws.registry import LAWS, LawEntry, LayerLoad, LayerState, register_law

__all__ = [
    "BalanceConfig",
    "LAWS",
    "Law",
    "LawEntry",
    "LawState",
    "LayerLoad",
    "LayerState",
    "make_law",
    "register_law",
]

del _rules
