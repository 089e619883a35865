"""Machines that become a Ray cluster.

Begin with `node`: it starts a Ray node on this machine, as the head of a cluster or joined to one, and ends it again.
`status` reads which nodes and jobs a cluster has, `gpus` how many GPUs. `manifests` writes files with which Kubernetes,
Slurm or `ray up` start a cluster.
"""
