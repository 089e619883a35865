"""The mixture-of-experts layer: how tokens reach their experts and come back, and what keeps the experts balanced.

Needs torch only. What is listed here keeps its name and its meaning; the modules behind it may move. A forward goes
through `routing` (which experts), `exchange` (rows to their ranks), `experts` (what they compute) and back; `layer`
puts them together and `chunks` orders them. `laws` turn the load into the next bias, which `balance` writes.
`copies` lets several ranks compute a hot expert. `diagnosis` explains hangs, `parity` compares a layer on ranks with
one process.
"""

from typing import TYPE_CHECKING

from dispatch.public import lazy_getattr

if TYPE_CHECKING:
    from dispatch.balance import LossFreeBalancer
    from dispatch.config import MoEConfig, ScheduleConfig
    from dispatch.exchange.dispatcher import Dispatcher
    from dispatch.exchange.factory import make_dispatcher
    from dispatch.exchange.node_groups import make_node_groups
    from dispatch.exchange.registry import register_backend
    from dispatch.experts.stacked import expert_parameters
    from dispatch.laws import BalanceConfig, LayerLoad, LayerState, register_law
    from dispatch.laws.load_metrics import max_vio
    from dispatch.layer import MoELayer
    from dispatch.routing.replay import Routing, recorded_routing

__all__ = [
    "MoELayer",
    "MoEConfig",
    "ScheduleConfig",
    "Dispatcher",
    "make_dispatcher",
    "make_node_groups",
    "register_backend",
    "expert_parameters",
    "LossFreeBalancer",
    "BalanceConfig",
    "register_law",
    "LayerLoad",
    "LayerState",
    "max_vio",
    "Routing",
    "recorded_routing",
]

__getattr__ = lazy_getattr(
    __name__,
    {
        "MoELayer": "dispatch.layer",
        "MoEConfig": "dispatch.config",
        "ScheduleConfig": "dispatch.config",
        "Dispatcher": "dispatch.exchange.dispatcher",
        "make_dispatcher": "dispatch.exchange.factory",
        "make_node_groups": "dispatch.exchange.node_groups",
        "register_backend": "dispatch.exchange.registry",
        "expert_parameters": "dispatch.experts.stacked",
        "LossFreeBalancer": "dispatch.balance",
        "BalanceConfig": "dispatch.laws",
        "register_law": "dispatch.laws",
        "LayerLoad": "dispatch.laws",
        "LayerState": "dispatch.laws",
        "max_vio": "dispatch.laws.load_metrics",
        "Routing": "dispatch.routing.replay",
        "recorded_routing": "dispatch.routing.replay",
    },
)
