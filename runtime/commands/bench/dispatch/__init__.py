"""`trimtab bench dispatch`: the MoE layer compared with its bare matmuls and its bare all-to-alls.

`command` reads the `choices`, and `benchmark` runs a process for each rank and `case`. On every rank `turns` measures:
`layer_run` runs the layer on tokens whose `routes` are drawn, `limits` has the bare matmuls and all-to-alls, `memory`
reads the peak. `figures` computes what `table` and `chart` show.
"""
