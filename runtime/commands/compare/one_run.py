"""One run of a comparison, in a process of its own: `python -m runtime.commands.compare.one_run OUT SLUG SEED`.

It saves and stops when its standard input ends: when the process that started it closes the pipe, or has died.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.commands.compare.plan import ComparePlan, RunKey
from runtime.job import job
from runtime.job.launch import make_spec, open_ranks
from runtime.runs.run_dir import CONFIG_FILE
from runtime.runs.run_inputs import find_checkpoint
from runtime.runs.run_lock import hold, hold_new, refuse_if_owned
from runtime.settings.config import TrainConfig
from runtime.settings.config_file import config_to_yaml
from runtime.terminal.interrupt import exit_code_of
from workers.data.prepare import prepare_dataset
from workers.record.atomic_file import write_atomically
from workers.record.run_log import append_event
from workers.training.outcome import TrainOutcome


def main(arguments: Sequence[str]) -> int:
    """Start or resume one run, and train until its end or until standard input ends. Returns 0 if it saved."""
    out, slug, seed = arguments
    plan = ComparePlan.read(Path(out))
    key = next(key for key in plan.runs if (key.method.slug, key.seed) == (slug, int(seed)))
    config, run_dir = plan.config_of(key), plan.run_dir(key)
    resume_from = _start_of(plan, key)
    if config.cluster.num_workers > 1 or config.cluster.address is not None:
        # The way a user stops it: job.train saves on the first SIGINT.
        _on_end_of_input(lambda: os.kill(os.getpid(), signal.SIGINT))
        code = job.train(config, resume=run_dir if resume_from else None, step=None)
        return 0 if code == exit_code_of(signal.SIGINT) else code
    train_alone(config, run_dir, resume_from)
    return 0


def train_alone(config: TrainConfig, run_dir: Path, resume_from: Path | None) -> TrainOutcome:
    """Train with one worker in this process, without Ray and coordinator. The results are the same to the bit.

    The run directory is that of `trimtab train`, without the report.
    """
    dataset = prepare_dataset(config.data)
    with (hold if resume_from else hold_new)(run_dir, print) as lock:
        write_atomically(run_dir / CONFIG_FILE, config_to_yaml(config))
        spec = replace(make_spec(config, run_dir, dataset), fence=lock.fence)
        try:
            with open_ranks(config.cluster, spec) as ranks:
                _on_end_of_input(lambda: ranks.run("request_stop"))
                outcomes: list[TrainOutcome] = ranks.run("train", resume_from and resume_from.absolute(), None)
        except BaseException as error:
            if lock.is_held():
                append_event(run_dir, "failed", reason=f"{type(error).__name__}: {error}")
            raise
    return outcomes[0]


def _start_of(plan: ComparePlan, key: RunKey) -> Path | None:
    """The checkpoint to go on from. A run without one begins again, in an empty folder: it repeats every bit."""
    run_dir = plan.run_dir(key)
    if plan.newest_checkpoint(key) is None:
        refuse_if_owned(run_dir)
        shutil.rmtree(run_dir, ignore_errors=True)
        return None
    return find_checkpoint(run_dir, None)


def _on_end_of_input(stop: Callable[[], object]) -> None:
    def watch() -> None:
        # Not by sys.stdin, whose lock this thread would hold when the interpreter ends.
        while os.read(sys.stdin.fileno(), 1):
            pass
        stop()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
