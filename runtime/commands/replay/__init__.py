"""`trimtab replay`: laws on recorded or simulated scores, without training.

`play.py` plays them on a `trace.py`, `comparison.py` sums up, and `history.py` recomputes the bias that the run
recorded.
"""
