"""Sends a run's metrics, while it trains, to TensorBoard, Weights & Biases and MLflow (`run.log_to`).

Begin with `logger`, the interface that `tensorboard_file`, `wandb_run` and `mlflow_run` implement. `scalars` turns a
line of metrics.jsonl into named numbers, and `load_pictures` turns the load into pictures. `feed` follows the run
directory and gives each logger the lines that it has not had yet. `__main__` does this in a process beside the run, so
that a logger that fails or blocks cannot delay a step.
"""
