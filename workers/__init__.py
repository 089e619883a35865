"""What one rank is: model, data, optimizer, checkpoints, the training step, and the Ray actor around it.

Begin with `worker.Worker`, the methods of a rank: join a gang, then train, evaluate or generate. `actor` carries them
over Ray. `training` has the optimizer step and the loop around it; it uses `model`, `data` (text to batches), `control`
(counts to the next bias), `checkpoints` and `record` (the files of a run directory). `distributed` joins ranks into
process groups; `generation` continues prompts. `run_config` has the settings of a run's length and batch.
"""
