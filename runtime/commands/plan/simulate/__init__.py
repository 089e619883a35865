"""`trimtab plan --simulate`: how long a step takes, and what imbalance costs, where nothing can be run.

`hardware.py` has the assumptions, each with its source; `work.py` counts what a rank computes, `routing.py` says which
rank gets how much of it, `timeline.py` lays both out in time; `sweep.py`, `sensitivity.py` and `laws.py` ask it again
and again. `command.py` is what the command line calls. Nothing here needs a device, and only `laws.py` reads a run.
"""
