"""How tokens reach their experts and come back: router, dispatchers, experts, MoE layer, laws. Needs torch only."""
