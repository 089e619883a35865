"""What `trimtab train` does, from checked settings to an exit code."""

import traceback
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from cluster.config import ClusterConfig
from cluster.failures.errors import MAX_DIAGNOSIS_CHARS, GangFailed
from cluster.gang.placement import worker_resources
from cluster.gang.preflight import check_resources
from cluster.ray.access import check_access, find_access
from dispatch.errors import InvalidValue
from runtime.job.companion import loggers_beside, page_beside
from runtime.job.initial_weights import make_initial_checkpoint
from runtime.job.launch import LaunchedGang, balance_of, make_spec, open_gang
from runtime.job.live import LiveView
from runtime.job.rank_map import exchange_of, rank_map, rank_table
from runtime.job.training_job import TrainingJob
from runtime.loggers.logger import check_installed
from runtime.runs.run_data import has_text_digest, keep_data
from runtime.runs.run_dir import CONFIG_FILE, HF_FOLDER, new_run_dir
from runtime.runs.run_inputs import find_checkpoint, open_data
from runtime.runs.run_lock import RunLock, hold, hold_new
from runtime.settings.cautions import cautions
from runtime.settings.config import TrainConfig, feasible_sizes
from runtime.settings.config_file import config_to_yaml
from runtime.settings.size import ModelSize, batch_bytes_at_least, model_size, recorded_scores_bytes, records_bytes
from runtime.settings.states import training_bytes
from runtime.terminal.interrupt import StopSignal
from runtime.terminal.quantities import counted
from runtime.terminal.say import say
from runtime.watch.packages import check_installed as check_page_installed
from workers.checkpoints.checkpoint_files import CHECKPOINTS, latest, list_checkpoints, step_of
from workers.data.shards import Dataset
from workers.record.atomic_file import write_atomically
from workers.record.record_check import find_holes, new_holes
from workers.record.run_log import METRICS, append_event, read_events
from workers.training.outcome import TrainOutcome


def train(
    config: TrainConfig,
    *,
    resume: Path | None,
    step: int | None,
    init: Path | None = None,
    dry_run: bool = False,
    watch: bool = False,
) -> int:
    """Train a model, or go on with the run in `resume`, and write its report. Returns the exit code.

    Args:
        resume: directory of the run to go on with; None starts a new run.
        step: the checkpoint of `resume` or `init` to take; None takes the newest.
        init: directory of the run with whose weights a new run begins.
        dry_run: check everything and print what would be trained, but start and write nothing.
        watch: serve the live page meanwhile.

    All checks come before the first process starts. A refused run leaves no directory behind.
    """
    console = Console(highlight=False)
    if watch:
        check_page_installed("--watch")
    run_dir = resume or new_run_dir(config.run.dir, config.run.name, datetime.now())
    with (hold if resume else hold_new)(run_dir, lambda text: say(console, text)) as lock:
        stop = StopSignal()
        source = resume or init
        start = None if source is None else find_checkpoint(source, step)
        if resume and start and step_of(start) == config.run.steps:
            return _end_complete(run_dir, config.run.steps, console, only_tell=dry_run)
        dataset = _checked(config, run_dir, start=start, is_new=resume is None, console=console)
        if dry_run:
            say(console, "dry run: nothing was refused, and nothing was started or written")
            return 0
        with page_beside(run_dir, lambda text: say(console, text), is_wanted=watch):
            outcome = _train(config, run_dir, lock, stop, dataset, start=start, is_new=resume is None, console=console)
        from runtime.report.report import print_summary

        print_summary(run_dir, console)
        say(console, report_line(run_dir))
    if outcome.completed:
        say(console, f"next: trimtab generate {run_dir} --prompt TEXT; trimtab train --resume {run_dir} --steps MORE")
        return 0
    say(console, f"stopped after step {outcome.step}, saved; go on with: trimtab train --resume {run_dir}")
    return stop.exit_code


def _checked(config: TrainConfig, run_dir: Path, *, start: Path | None, is_new: bool, console: Console) -> Dataset:
    """Make all checks that need no process, print what will be trained, and return the training text.

    start: the checkpoint to go on from; for a new run (`is_new`) the one of another run, to take its weights.
    """
    resume_from = None if is_new else start
    if resume_from and step_of(resume_from) > config.run.steps:
        raise InvalidValue(
            f"{run_dir} would go on from step {step_of(resume_from)}, and run.steps ({config.run.steps}) must be more; "
            "give a larger --steps, or an earlier checkpoint with --step N"
        )
    if resume_from and not config.run.accept_holes:
        refuse_holes(run_dir, resume_from)
    check_installed(config.run.log_to)
    if config.cluster.address is not None:
        check_access(find_access(config.cluster.address), allow_open=config.cluster.allow_without_token)
    size = model_size(config.model, config.optim)
    on_cpu = config.cluster.device == "cpu" or not torch.cuda.is_available()
    tight = check_resources(
        config.cluster,
        run_dir,
        run_disk_bytes=size.checkpoint_bytes * (config.run.keep_checkpoints + 1) + records_bytes(config),
        model_bytes_per_worker=training_bytes(config) + on_cpu * batch_bytes_at_least(config),
    )
    if tight:
        say(console, tight)
    dataset = open_data(config, console, run_dir if resume_from else None)
    say(console, _headline(config, _beginning(run_dir, start, is_new), dataset, size))
    for text in cautions(config, is_imported=(run_dir / HF_FOLDER).exists()):
        say(console, f"note   {text}")
    return dataset


def _end_complete(run_dir: Path, steps: int, console: Console, *, only_tell: bool) -> int:
    """Say that the run has no step left, and return the exit code 0: a batch job that is started again has succeeded.

    If the run was killed between its last checkpoint and its report, its `finished` event and the report are written
    now, unless `only_tell`.
    """
    say(console, f"{run_dir} has trained its {steps} steps: nothing is left to do; a larger --steps goes on")
    ends = [event["step"] for event in read_events(run_dir) if event["event"] == "finished"]
    if not only_tell and steps not in ends:
        append_event(run_dir, "finished", step=steps, saved_step=steps)
        say(console, report_line(run_dir))
    return 0


def _train(
    config: TrainConfig,
    run_dir: Path,
    lock: RunLock,
    stop: StopSignal,
    dataset: Dataset,
    *,
    start: Path | None,
    is_new: bool,
    console: Console,
) -> TrainOutcome:
    """Start the gang and let it train; `start` is as in `_checked`."""
    resume_from = None if is_new else start
    with ExitStack() as stack:
        with _status(console, f"starting Ray and {counted(config.cluster.num_workers, 'worker')}"):
            spec = replace(make_spec(config, run_dir, dataset), fence=lock.fence)
            launched = stack.enter_context(open_gang(config.cluster, spec, sizes=feasible_sizes(config)))
        lock.check()  # The start takes long enough for another process to take the directory over.
        if is_new and start is not None:  # Only now that all ranks have started: a failed start should leave no files.
            resume_from = make_initial_checkpoint(start, run_dir)
            append_event(run_dir, "initialised", source=str(start), lr=config.optim.lr)
        if has_text_digest(run_dir) or resume_from is None or step_of(resume_from) == 0:
            config = replace(config, data=keep_data(run_dir, config.data, dataset))
        write_atomically(run_dir / CONFIG_FILE, config_to_yaml(as_recorded(config)))
        return _watch(config, run_dir, lock, stop, launched, resume_from, console)


def refuse_holes(run_dir: Path, resume_from: Path) -> None:
    """Raise InvalidValue if the records lack steps before the checkpoint, and no event has recorded this gap yet."""
    step = step_of(resume_from)
    holes = new_holes(run_dir, find_holes(run_dir, step))
    if not holes:
        return
    first = min((hole.steps[0] for hole in holes if hole.steps), default=step + 1)
    saved = [step_of(path) for path in list_checkpoints(run_dir / CHECKPOINTS)]
    before = max((each for each in saved if each < first), default=None)
    earlier = f"go on from before it with --step {before}, or " if before is not None and before < step else ""
    raise InvalidValue(
        f"the records of {run_dir} have a hole before step {step}, from which the run would go on: "
        f"{'; '.join(map(str, holes))}. Restore the file from a copy, or {earlier}go on without these records, which "
        "the events and the report will say, with --run.accept_holes true"
    )


def _status(console: Console, text: str) -> AbstractContextManager[object]:
    """Show what the command waits for: by a spinner on a terminal, by a line elsewhere."""
    if console.is_terminal:
        return console.status(text)
    say(console, text)
    return nullcontext()


def _watch(
    config: TrainConfig,
    run_dir: Path,
    lock: RunLock,
    stop: StopSignal,
    launched: LaunchedGang,
    resume_from: Path | None,
    console: Console,
) -> TrainOutcome:
    """Let the supervisor run the training to its end, and show progress and events. Returns the outcome of rank 0."""
    from cluster.gang.supervisor import GaveUp, Supervisor

    gang = launched.gang
    say(console, rank_table(rank_map(config, gang), exchange_of(config, gang)))
    workers = counted(gang.world_size, "worker")
    say(console, f"Ray was up after {launched.ray_s:.1f} s, {workers} {launched.gang_s:.1f} s later")
    done = step_of(resume_from) if resume_from else 0

    def warn(text: str) -> None:
        say(console, text)
        if lock.is_held():
            append_event(run_dir, "warning", text=text)

    with (
        loggers_beside(run_dir, config.run.log_to, warn),
        stop as signal,
        LiveView(config.run.steps, done_steps=done, console=console) as view,
    ):
        job = TrainingJob(config, run_dir, lock, launched, resume_from, view=view, signal=signal)
        try:
            outcomes: list[TrainOutcome] = Supervisor(gang, job, config.cluster, feasible_sizes(config)).run()
            job.on_poll(gang)  # shows what rank 0 has reported since the last poll
        except BaseException as error:
            # The supervisor has recorded a GangFailed and a GaveUp already.
            if not isinstance(error, GangFailed | GaveUp) and lock.is_held():
                trace = "".join(traceback.format_exception(error))[-MAX_DIAGNOSIS_CHARS:]
                append_event(run_dir, "failed", reason=f"{type(error).__name__}: {error}", diagnosis=trace)
            if saved := latest(run_dir / CHECKPOINTS):
                view.event(f"saved up to step {step_of(saved)}; go on with: trimtab train --resume {run_dir}")
            # No report after an interrupt, which is no Exception: the user wants the command to end now.
            if isinstance(error, Exception) and (run_dir / METRICS).exists():
                view.event(_report_of_failed(run_dir))
            raise
    return outcomes[0]


def report_line(run_dir: Path) -> str:
    """Write the report of a run that is over. Returns a line with its path, or with the error of a full disk."""
    from runtime.report.report import write_report

    try:
        return f"report: {write_report(run_dir)}"
    except OSError as error:
        return f"the report could not be written ({error}); free some space, then: trimtab report {run_dir}"


def _report_of_failed(run_dir: Path) -> str:
    """Call `report_line` for a failed run. An exception of the report must not hide the error of the run."""
    try:
        return report_line(run_dir)
    except Exception as error:  # noqa: BLE001 See above.
        return f"there is no report ({type(error).__name__}: {error}): trimtab report {run_dir}"


def as_recorded(config: TrainConfig) -> TrainConfig:
    """The settings for config.yaml. A later resume may start in another directory, so paths are absolute."""
    data = config.data
    paths = tuple(str(Path(path).expanduser().absolute()) for path in data.path)
    tokenizer, template = (
        name and str(Path(name).expanduser().absolute()) for name in (data.tokenizer, data.chat_template)
    )
    # The next two settings are a decision for one start: to prepare the text again, and to accept the gaps that the
    # user has seen.
    recorded = replace(data, path=paths, tokenizer=tokenizer, chat_template=template, rebuild=False)
    return replace(config, data=recorded, run=replace(config.run, accept_holes=False))


def _idle_gpus(cluster: ClusterConfig) -> str:
    """A line that says why the GPUs of this machine stay idle, if `auto` leaves them idle; else ""."""
    num_gpus = torch.cuda.device_count() if cluster.address is None and cluster.device == "auto" else 0
    if not num_gpus or "GPU" in worker_resources(cluster, num_gpus):
        return ""
    return (
        f"\ndevice cpu, because auto takes a GPU for each of {cluster.num_workers} workers and this machine has "
        f"{num_gpus}; --workers {num_gpus} trains on cuda"
    )


def _beginning(run_dir: Path, start: Path | None, is_new: bool) -> str:
    if start is None:
        return f"run {run_dir}"
    return f"run {run_dir}, with the weights of {start}" if is_new else f"going on from {start}"


def _headline(config: TrainConfig, beginning: str, dataset: Dataset, size: ModelSize) -> str:
    moe = config.model.moe
    sources = ", ".join(
        f"{source.name} ({source.train.num_text_bytes / 1e6:.1f} MB)" for source in dataset.meta.sources
    )
    if num_copies := sum(source.num_copies for source in dataset.meta.sources):
        sources += f"; files that copy another: {num_copies}, each trained on or held out together with it"
    return (
        f"{beginning}\n"
        f"model  {size.total / 1e6:.2f}M parameters, {size.active / 1e6:.2f}M active per token; "
        f"{moe.num_experts} experts, top-{moe.top_k}, in {config.model.num_layers - config.model.num_dense_layers} "
        f"layers\ntext   {sources}\n"
        f"law    {config.balance.law}, rate {balance_of(config).rate_at(1):g}"
        + _idle_gpus(config.cluster)
        + (f"\nscores {recorded_scores_bytes(config) / 1e6:,.1f} MB to come" if config.balance.record else "")
    )
