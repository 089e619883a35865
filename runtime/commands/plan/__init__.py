"""`trimtab plan`: memory of each rank and bytes on the network before anything starts.

`subject.py` reads what is planned, `activations.py` and `traffic.py` compute, `stages.py` takes a pipeline
apart, `plan.py` adds up, `table.py` prints.
"""
