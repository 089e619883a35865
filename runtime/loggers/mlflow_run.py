"""A run of MLflow: at the server that MLFLOW_TRACKING_URI names, else in a file store in the folder of runs."""

import os
import re
from collections.abc import Mapping

from runtime.loggers.logger import LoggedRun
from workers.record.record_lines import Line

EXPERIMENT = "trimtab"  # unless MLFLOW_EXPERIMENT_NAME names another
STORE = "mlruns"
ALLOW_FILES = "MLFLOW_ALLOW_FILE_STORE"  # MLflow recommends databases, and refuses a file store without this variable.
_STATES = {"finished": "FINISHED", "interrupted": "KILLED"}
_MAX_METRICS, _MAX_PARAMS, _MAX_CHARACTERS = 1_000, 100, 6_000  # MLflow's limits of one request and of one value


class MlflowRun:
    """Logs to a run of MLflow. `id` is the one that MLflow chose when it made the run."""

    def __init__(self, run: LoggedRun) -> None:
        """Make the run, or go on with it. Raises where the store cannot be reached."""
        os.environ.setdefault(ALLOW_FILES, "true")
        from mlflow import MlflowClient

        uri = run.environ.get("MLFLOW_TRACKING_URI") or (run.path.absolute().parent / STORE).as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if run.id is None:
            self.id = self._new_run(run)
        else:
            self.id = run.id
            self._client.update_run(run.id, status="RUNNING")

    def log(self, line: Line, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        time_ms = round(line["time"] * 1000)
        metrics = [Metric(_key(name), value, time_ms, line["step"]) for name, value in values.items()]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _MAX_METRICS])

    def close(self, state: str) -> None:
        self._client.set_terminated(self.id, status=_STATES.get(state, "FAILED"))

    def _new_run(self, run: LoggedRun) -> str:
        from mlflow.entities import Param

        name = run.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        made = str(self._client.create_run(experiment_id, run_name=run.name).info.run_id)
        params = [Param(_key(key), str(value)[:_MAX_CHARACTERS]) for key, value in run.settings.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(made, params=params[start : start + _MAX_PARAMS])
        return made


def _key(name: str) -> str:
    """The name, with _ for characters that MLflow refuses, and for parts of dots: `..` is a folder in a file store."""
    parts = [re.sub(r"[^\w .:-]", "_", part, flags=re.ASCII) for part in name.split("/")]
    return "/".join("_" if not part.strip(".") else part for part in parts)
