"""A run of Weights & Biases, online or offline as its environment variables say (WANDB_MODE, WANDB_PROJECT, ...)."""

import secrets
from collections.abc import Mapping

from runtime.loggers.logger import LoggedRun
from workers.record.record_lines import Line

PROJECT = "trimtab"  # unless WANDB_PROJECT names another
STEP = "step"


class WandbRun:
    """Logs to a run of Weights & Biases. We choose its id, with which a resumed run continues the same curves.

    wandb's own step may not decrease: it drops later values of an earlier step, as a recovery has them. So `step` is a
    metric here, and the x axis of all others.
    """

    def __init__(self, run: LoggedRun) -> None:
        """Open the run. Online this waits for the server, and raises if there is none or if nobody is logged in."""
        import wandb

        self.id = run.id or secrets.token_hex(8)
        self._run = wandb.init(
            id=self.id,
            resume="allow",
            name=run.name,
            project=None if run.environ.get("WANDB_PROJECT") else PROJECT,
            dir=run.path,
            config=None if run.id else dict(run.settings),  # wandb refuses other values for what it has
            # No console output or system metrics: this process is not the one that trains.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, save_code=False),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, line: Line, values: Mapping[str, float]) -> None:
        self._run.log({STEP: line["step"], "_timestamp": line["time"], **values})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=int(state not in ("finished", "interrupted")))
