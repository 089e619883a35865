"""`trimtab bench`: measurements on the machine at hand.

A folder for each target; `out.py` and `progress.py` serve all of them.
"""
