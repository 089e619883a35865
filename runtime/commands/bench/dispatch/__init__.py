"""`trimtab bench dispatch`: the MoE layer beside the limits of its matmuls and of its exchange.

`command` reads the `choices`, and `benchmark` runs a process for each rank and `case`. On every rank `turns` measures:
`layer_run` runs the layer on tokens whose `routes` are drawn, `limits` has the bare matmuls and all-to-alls, `memory`
reads the peak. `figures` computes what `table` and `chart` show.
"""
