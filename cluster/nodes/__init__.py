"""Machines that become a Ray cluster.

Begin with `node`: it starts this machine's part of a cluster, as the head or joined to one, and ends it again.
`status` reads what a cluster consists of, `gpus` how many GPUs it has. `manifests` writes files that let Kubernetes,
Slurm or `ray up` do it.
"""
