"""`trimtab bench`: measurements on the machine at hand.

A folder for each target: `balance`, `coordinator`, `dispatch`.
"""
