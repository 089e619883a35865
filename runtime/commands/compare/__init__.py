"""`trimtab compare`: ways of balancing, compared in training.

Begin with `comparison`. `methods` names the ways and `plan` the runs; `run_pool` trains them, each in a process of its
own (`one_run`), while `view` shows progress. `outcome` has what they found, and `tables` and `chart` show it.
`command` is the command line.
"""
