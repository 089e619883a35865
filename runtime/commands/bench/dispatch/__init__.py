"""`trimtab bench dispatch`: the MoE layer.

`turns.py` measures on every rank, `layer_run.py` runs the layer, `limits.py` the bare matmuls and all-to-alls beside
it, `figures.py` computes what `table.py` and `chart.py` show.
"""
