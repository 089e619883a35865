"""Files that let Kubernetes, Slurm or `ray up` start a cluster and train on it, made from one plan."""
