"""`trimtab replay`: simulates laws on recorded or made-up router scores, without training.

Begin with `replay`. `history` recomputes the bias that a run recorded, from its counts and the settings in force at
each step (`starts`). `play` simulates laws (`specs` reads their names), which choose the experts of a `trace`: a
`score_trace` that a run recorded, or a `simulation`. `figures` measures each law, `floors` has the least imbalance that
any could reach, `copies` says what copies of hot experts would have saved. `comparison` sums up for `table` and
`chart`. `command` is the command line.
"""
