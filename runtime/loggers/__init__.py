"""Other people's tools get a run's numbers while it trains: TensorBoard, Weights & Biases, MLflow (`run.log_to`).

Begin with `logger`: the interface that each of them has, in `tensorboard_file`, `wandb_run` and `mlflow_run`; `scalars`
says how a line of metrics.jsonl becomes named numbers, and `load_pictures` how the load becomes pictures. `feed` reads
the run directory on and hands each logger what it has not had; `__main__` is the process beside the run that does it,
so that no logger can cost the run a step.
"""
