"""A count reaches the bias through the files that docs/architecture.md names: one is followed through a step."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

from dispatch.laws import BalanceConfig
from dispatch.routing.router import Router
from tests.documented_paths import ROOT, documented_path
from tests.ranks import run_ranks
from tests.test_layers import LAYERS
from tests.workers.training_gang import join_worker, make_spec
from workers.control.loop import ControlLoop
from workers.training import step
from workers.training.worker_spec import WorkerSpec

MAX_FILES = 9

# What these functions ask on the way: it holds neither a count nor what became of it.
BESIDE = {
    "dispatch/routing/selection.py",  # how often each id occurs
    "dispatch/layout.py",  # where each layer lies in the vector
    "dispatch/diagnosis/activity_tracker.py",  # notes the phase and the collectives, for the report of a hang
    "dispatch/registry.py",  # which law a name stands for
    "dispatch/values.py",  # copies the bias to the device
}


def _files_passed(rank: int, world_size: int, spec: WorkerSpec) -> set[str]:
    """The files of ours whose functions run, in a step, where a count is made, handed over, carried and used."""
    passed: set[CodeType] = set()

    def followed(function: Callable[..., Any]) -> Callable[..., Any]:
        def follow(*args: Any, **kwargs: Any) -> Any:
            passed.add(sys._getframe(1).f_code)  # who hands it over
            sys.setprofile(lambda frame, _event, _arg: passed.add(frame.f_code))
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return follow

    for owner, name in (
        (Router, "_count"),
        (step, "read_counts"),
        (ControlLoop, "begin_step"),
        (ControlLoop, "_run"),  # its thread
        (ControlLoop, "finish_step"),
    ):
        setattr(owner, name, followed(getattr(owner, name)))
    join_worker(spec, rank, world_size, "path").train()
    files = {Path(code.co_filename) for code in passed}
    ours = [ROOT / package for package in LAYERS]
    return {str(file.relative_to(ROOT)) for file in files if any(file.is_relative_to(folder) for folder in ours)}


def test_a_count_passes_the_files_that_the_architecture_names_and_at_most_nine(tmp_path: Path) -> None:
    path = documented_path("a count")
    assert len(path) <= MAX_FILES
    spec = replace(make_spec(tmp_path, steps=1), balance=BalanceConfig(law="sign"))
    [passed] = run_ranks(1, _files_passed, spec)
    assert passed - BESIDE == set(path)
