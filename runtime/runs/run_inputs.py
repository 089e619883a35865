"""Opens the checkpoint and the text of a run, for commands. Needs no matplotlib, whose import takes a second."""

from pathlib import Path

from rich.console import Console

from dispatch.errors import InvalidValue
from runtime.runs.run_data import open_run_data
from runtime.settings.config import TrainConfig
from workers.checkpoints.checkpoint_files import CHECKPOINTS, CheckpointError, list_checkpoints, step_of
from workers.data.prepare import prepare_dataset
from workers.data.sampler import Sampler
from workers.data.shards import Dataset


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest one, verified file by file.

    Raises:
        InvalidValue: there is none, or none of that step; the message names the steps that there are.
        CheckpointCorrupt: it is damaged; the message names the newest intact one before it.
    """
    path = checkpoint_of(run_dir, step)
    from workers.checkpoints.checkpoint import verify  # imports DCP, which takes a second

    try:
        verify(path)
    except CheckpointError:
        if step is not None or path.is_dir():
            raise
        return find_checkpoint(run_dir, None)  # The run is training: it has removed this checkpoint for newer ones.
    return path


def checkpoint_of(run_dir: Path, step: int | None) -> Path:
    """The newest checkpoint of a run or that of `step`; its files are not verified.

    Raises:
        InvalidValue: there is none, or none of that step; names those there are.
    """
    found = {step_of(path): path for path in list_checkpoints(run_dir / CHECKPOINTS)}
    if not found:
        raise InvalidValue(f"{run_dir} has no complete checkpoint yet; to start a run again, give it another --name")
    path = found.get(max(found) if step is None else step)
    if path is None:
        raise InvalidValue(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(found)))}")
    return path


def still_there(path: Path, run_dir: Path, step: int | None) -> Path:
    """The checkpoint at `path`; if a training run has removed it since it was found, the newest one."""
    return path if path.is_dir() else find_checkpoint(run_dir, step)


def open_data(config: TrainConfig, console: Console, run_dir: Path | None = None) -> Dataset:
    """The prepared text of a run. Prepares it if that was not done yet; refuses a text too short for the batches.

    run_dir: directory of a run that has begun, whose text is found by its digest; None for a new run.
    """
    with console.status("preparing the text") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"preparing the text: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        if run_dir is None:
            dataset = prepare_dataset(config.data, progress)
        else:
            dataset = open_run_data(run_dir, config.data, progress)
    run = config.run
    Sampler(dataset, config.model.max_seq_len, run.global_batch_size, run.seed, config.data.mix_schedule)
    return dataset
