"""What `trimtab train` does: from checked settings to ranks at work, and to the end.

Begin with `job.py`; `initial_weights.py` is `--init`, `launch.py` starts the ranks, `training_job.py` watches one
training, `live.py` shows it, `now_file.py` writes what each rank is in, `companion.py` starts what reads the run
directory beside it, and `coordinator.py` is the actor that computes the bias.
"""
