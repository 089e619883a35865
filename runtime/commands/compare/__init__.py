"""`trimtab compare`: ways of balancing, compared in training.

`plan.py` holds what is compared, `run_pool.py` trains, `outcome.py` reads the results, `tables.py` and `picture.py`
show them.
"""
