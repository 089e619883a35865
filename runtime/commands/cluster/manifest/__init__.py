"""`trimtab cluster manifest`: files that start a cluster under Kubernetes, Slurm or `ray up`.

A file for each: `kuberay`, `slurm`, `ray_up`; `options` has what they share.
"""
