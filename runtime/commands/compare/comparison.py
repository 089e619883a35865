"""`trimtab compare`: train under each method and seed, then print, draw and record what came of it."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from cluster.gang.preflight import check_resources
from dispatch.errors import InvalidValue
from runtime.commands.compare.methods import parse_methods
from runtime.commands.compare.outcome import read_outcome
from runtime.commands.compare.plan import PLAN_FILE, ComparePlan, RunKey, grown
from runtime.commands.compare.run_pool import EndedRun, RunPool
from runtime.commands.compare.tables import print_tables, write_results
from runtime.commands.compare.view import CompareView
from runtime.job import job
from runtime.job.launch import runs_in_process
from runtime.runs.run_inputs import open_data
from runtime.settings.config_file import load_config, override
from runtime.settings.size import model_size
from runtime.settings.states import training_bytes
from runtime.terminal.interrupt import StopSignal
from runtime.terminal.quantities import counted
from runtime.terminal.say import say
from workers.actor import usable_cores


def compare(options: argparse.Namespace) -> int:
    """Train the runs that are missing and show the results. Returns 1 if a run failed, 130 if it was stopped."""
    console = Console(highlight=False)
    plan = plan_of(options)
    jobs = _num_jobs(plan, options.jobs)
    unfinished = [key for key in plan.runs if not plan.is_finished(key)]
    _check(plan, unfinished, jobs, console)
    plan.write()
    failed, stop_code = _train(plan, unfinished, jobs, console) if unfinished else ([], 0)
    _show_results(plan, options.threshold, console)
    for run in failed:
        say(console, f"failed: {run.key}: {run.reason} (all of it: {plan.log_file(run.key)})")
    if stop_code or failed:
        say(console, f"go on with: trimtab compare --resume --out {plan.out}")
    return 1 if failed else stop_code


def plan_of(options: argparse.Namespace) -> ComparePlan:
    """The plan that the command line asks for; the settings of each method are checked.

    Raises:
        InvalidValue: a method or setting is wrong, changed since the comparison began, or the folder is taken.
    """
    out = options.out.expanduser().absolute()
    methods = parse_methods(options.laws or ())
    if options.resume:
        saved = ComparePlan.read(out)
        base = job.as_recorded(override(saved.base, options.settings))
        plan = grown(saved, ComparePlan(out, methods, options.seeds or saved.num_seeds, base))
    else:
        if (out / PLAN_FILE).exists():
            raise InvalidValue(f"there is a comparison in {out} already; go on with --resume, or give another --out")
        base = job.as_recorded(override(load_config(options.config), options.settings))
        plan = ComparePlan(out, methods, options.seeds, base)
    for method in plan.methods:
        try:
            plan.config_of(RunKey(method, base.run.seed))
        except InvalidValue as error:
            raise InvalidValue(f"{method.spec}: {error}") from error
    return plan


def _check(plan: ComparePlan, unfinished: Sequence[RunKey], jobs: int, console: Console) -> None:
    """Refuse settings that would fail later, and prepare the text once for all runs."""
    base = plan.base
    size = model_size(base.model, base.optim)
    num_at_once = min(jobs, len(unfinished))  # by default there are as many jobs as cores
    check_resources(
        replace(base.cluster, num_workers=max(1, num_at_once) * base.cluster.num_workers),
        plan.out,
        run_disk_bytes=size.checkpoint_bytes * (base.run.keep_checkpoints + 1) * len(unfinished),
        model_bytes_per_worker=training_bytes(base),
    )
    open_data(base, console)
    size_of_it = (
        f"{counted(len(plan.methods), 'method')} x {counted(plan.num_seeds, 'seed')}, {base.run.steps} steps each"
    )
    say(
        console,
        f"comparison {plan.out}\n{size_of_it}; {num_at_once} at a time; {counted(len(unfinished), 'run')} to do",
    )


def _train(plan: ComparePlan, unfinished: Sequence[RunKey], jobs: int, console: Console) -> tuple[list[EndedRun], int]:
    """Train the runs that are not finished. Returns those that failed, and the exit code of a stop signal or 0."""
    failed: list[EndedRun] = []
    cluster = plan.base.cluster
    threads = cluster.threads_per_worker or max(1, usable_cores() // (jobs * cluster.num_workers))
    with (
        StopSignal() as signal,
        CompareView(plan, unfinished, console) as view,
        RunPool(plan, jobs, threads) as pool,
    ):
        told = False

        def show() -> None:
            nonlocal told
            if signal.stop_requested and not told:
                told = True
                view.say("stopping: the runs save a checkpoint after this step; Ctrl-C again stops at once")
            view.show(pool.active)

        def end(run: EndedRun) -> None:
            if run.reason is not None:
                failed.append(run)
            view.ended(run)

        pool.run(unfinished, stop_requested=lambda: signal.stop_requested, on_poll=show, on_end=end)
        return failed, signal.exit_code


def _show_results(plan: ComparePlan, threshold: float | None, console: Console) -> None:
    outcome = read_outcome(plan, threshold)
    if outcome is None:
        say(console, "no run is finished yet: there is nothing to compare")
        return
    print_tables(outcome, console)
    for path in write_results(outcome, plan.out):
        say(console, str(path))


def _num_jobs(plan: ComparePlan, wanted: int | None) -> int:
    if runs_in_process(plan.base.cluster):
        return wanted or usable_cores()
    # Several gangs on one machine or one cluster would only wait for each other.
    if (wanted or 1) > 1:
        raise InvalidValue(f"--jobs {wanted} runs side by side need one worker each; set --workers 1, or --jobs 1")
    return 1
