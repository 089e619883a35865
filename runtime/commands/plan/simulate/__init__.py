"""`trimtab plan --simulate`: how long a step takes, and what imbalance costs, where nothing can be run.

Begin with `simulation`, which computes the time of a step; `layer` that of one MoE layer, whose ranks wait for each
other. `scope` refuses settings that it cannot simulate. `hardware` has the assumptions, each with its source; `work`
counts what a rank computes, and `routing` says which rank gets how much of it. `sweep`, `sensitivity` and `laws`
simulate again with other sizes, assumptions and laws. `report` holds all that was found; `table` and `chart` show it.
Nothing here needs a device, and only `laws` reads a run.
"""
