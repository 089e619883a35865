"""What `trimtab train` does: from checked settings to ranks at work, and to the end.

Begin with `job`; `initial_weights` is `--init`, `launch` starts the ranks, `rank_map` says where they live, and
`coordinator` is the actor that computes the bias. `training_job` watches one training, `live` shows it, `now_file`
writes where each rank is, and `companion` starts what reads the run directory beside it.
"""
