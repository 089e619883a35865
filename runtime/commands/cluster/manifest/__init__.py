"""`trimtab cluster manifest`: files that start a cluster under Kubernetes, Slurm or `ray up`.

`options.py` has what they share.
"""
