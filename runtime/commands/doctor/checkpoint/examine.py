"""Finds out what lies at a path, examines it, and prints what is wrong."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dispatch.errors import InvalidValue
from runtime.commands.doctor.checkpoint.findings import CheckpointReport
from runtime.commands.results import write_json
from runtime.runs.run_dir import CONFIG_FILE, find_run
from runtime.runs.run_inputs import checkpoint_of
from runtime.terminal.quantities import counted
from workers.checkpoints.checkpoint_files import CHECKPOINTS, MANIFEST
from workers.model.hugging_face.source import CONFIG as HUB_CONFIG

MAX_LINES = 40  # of findings in the terminal; --json has them all


def examine(name: str, step: int | None, out: Path | None) -> int:
    """Examine what `name` names and return the exit code: 1 where something is wrong.

    Raises:
        InvalidValue: nothing there can be examined, or the run has no such checkpoint.
    """
    path = Path(name).expanduser()
    is_hub = (path / HUB_CONFIG).is_file() and not (path / MANIFEST).exists()
    if is_hub and step is not None:
        raise InvalidValue(f"--step ({step}) chooses a checkpoint of a run, and {path} is a directory of Hugging Face")
    with _progress() as progress:
        if is_hub:
            from runtime.commands.doctor.checkpoint.hub import examine_hub_directory

            report = examine_hub_directory(path, progress)
        else:
            from runtime.commands.doctor.checkpoint.ours import examine_checkpoint

            report = examine_checkpoint(find_checkpoint(name, step), progress)
    sys.stdout.write(as_text(report))
    if out is not None:
        write_json(out, asdict(report), indent=1)
    return 0 if report.is_sound else 1


def find_checkpoint(name: str, step: int | None) -> Path:
    """The folder of a checkpoint, given itself or by its run; nothing of it is verified yet.

    Raises:
        InvalidValue: there is none, or `step` is given with a checkpoint itself.
    """
    path = Path(name).expanduser()
    if (path.parent.name == CHECKPOINTS and path.is_dir()) or (path / MANIFEST).is_file():
        if step is not None:
            raise InvalidValue(f"--step ({step}) chooses a checkpoint of a run, and {path} is a checkpoint itself")
        return path
    try:
        run_dir = find_run(name)
    except InvalidValue as error:
        raise InvalidValue(
            f"{name} is neither a checkpoint ({MANIFEST}), nor a run ({CONFIG_FILE}), nor a directory of Hugging Face "
            f"({HUB_CONFIG}): {error}; a cluster is examined by `trimtab doctor cluster`"
        ) from None
    return checkpoint_of(run_dir, step)


def as_text(report: CheckpointReport) -> str:
    """What was examined, what is wrong, and the verdict."""
    lines = [report.subject, *(f"  {name:10}{value}" for name, value in report.facts.items()), ""]
    for damage in report.found[:MAX_LINES]:
        where = f"{damage.file}: {damage.tensor}" if damage.tensor else damage.file
        lines.append(f"{damage.severity}: {where} {damage.problem}")
    if len(report.found) > MAX_LINES:
        lines.append(f"... and {len(report.found) - MAX_LINES} more; --json FILE has all")
    num_errors = sum(damage.severity == "error" for damage in report.found)
    verdict = "sound" if report.is_sound else f"damaged: {counted(num_errors, 'error')}"
    return "\n".join([*lines, verdict]) + "\n"


@contextmanager
def _progress() -> Iterator[Callable[[str, float, float], None]]:
    """A bar on the terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
