"""How tokens reach their experts and come back: router, dispatchers, experts, MoE layer, balancing laws. Needs torch only."""
