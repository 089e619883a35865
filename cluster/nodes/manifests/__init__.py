"""Files that let Kubernetes, Slurm or `ray up` start a cluster and train on it, made from one plan.

Begin with `plan.ManifestPlan`; `kuberay`, `slurm` and `ray_up` each turn it into text.
"""
