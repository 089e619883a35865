"""Sections that need no CUDA, on the CPU; and the process of a section."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checkpoints, commands, process, step_profile
from benchmarks.gpu.section import SECTIONS, Section, Setting
from benchmarks.gpu.sizes import SMALL
from benchmarks.gpu.training import read_run
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _told(measure, folder):
    told = []
    measure(Setting(SMALL, CPU, folder, lambda figures: told.append(dict(figures))))
    return told


def _profiled(rank, world_size, folder):
    torch.distributed.destroy_process_group()  # the run makes its own
    return _told(step_profile.measure, folder)


def test_a_step_is_profiled(tmp_path):
    (told,) = run_ranks(1, _profiled, tmp_path)
    before, found = told
    assert before["step_ms"] > 0
    assert set(found["groups_ms"]) == set(step_profile.GROUPS)
    assert min(found["groups_ms"][group] for group in (step_profile.DENSE, step_profile.ATTENTION)) > 0
    assert found["groups_ms"][step_profile.OPTIMIZER] > 0
    assert sum(found["groups_ms"].values()) == pytest.approx(found["kernels_ms"])


def test_a_checkpoint_is_measured_beside_a_plain_write(tmp_path):
    copied, found = _told(checkpoints.measure, tmp_path)
    assert copied.keys() < found.keys()
    assert found["copy"]["arrived_s"] >= found["copy"]["stopped_s"] > 0
    assert found["disk"].keys() == {"plain", "save", "load"}
    assert len(found["save_over_plain"]) == 1
    assert len(checkpoints.show(copied)) < len(checkpoints.show(found))


def test_a_run_is_read_without_its_warm_up(tmp_path):
    phases = dict.fromkeys(("dispatch_s", "experts_s", "combine_s", "bias_update_s", "control_wait_s"), 0.01)
    rates = (10.0, 200.0, 400.0, 300.0)
    lines = [
        {"kind": "train", "step": step, "tokens_per_s": rate, "mfu": rate / 1000, "tflops_per_s": 1.0, "step_s": 0.1}
        for step, rate in enumerate(rates, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | phases) + "\n" for line in lines))
    events = [
        {"event": "started", "ray_s": 2.0, "gang_s": 3.0},
        {"event": "checkpoint", "bytes": 9, "blocked_s": 1.0, "write_s": 1.0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = read_run(tmp_path, warm_up_steps=1, held_bytes=3 << 20)
    assert (found["num_steps"], found["tokens_per_s"], found["mfu"], found["held_mib"]) == (3, 300.0, 0.3, 3.0)
    assert found["seconds"]["step_s"] == 0.1
    assert found["last_checkpoint"] == {"bytes": 9, "blocked_s": 1.0, "write_s": 1.0}


def test_a_run_that_did_not_reach_a_step_has_no_figures(tmp_path):
    assert read_run(tmp_path, warm_up_steps=1, held_bytes=0) == {}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1}) + "\n")
    assert read_run(tmp_path, warm_up_steps=1, held_bytes=0) == {}


def test_a_command_that_fails_says_what_it_said_last():
    with pytest.raises(commands.CommandFailed, match=r"dispatch\.parity --ep ended with code 2 and said last: .*--ep"):
        commands.run_module("dispatch.parity", "--ep", "none")


class _Fails(Section):
    def measure(self, setting):
        setting.tell({"half": 1})
        raise RuntimeError("the device is gone\nand much more")


class _Dies(Section):
    def measure(self, setting):
        setting.tell({"half": 1})
        os.kill(os.getpid(), signal.SIGKILL)


class _Waits(Section):
    def measure(self, setting):
        setting.tell({"folder": str(setting.folder)})
        time.sleep(600)


@pytest.fixture
def stub(monkeypatch):
    """A section of this kind under the name checks, in a process that was forked and so knows it."""
    monkeypatch.setattr(process, "START", "fork")
    return lambda kind: monkeypatch.setitem(SECTIONS, "checks", kind("t", "m"))


@pytest.mark.parametrize(
    ("kind", "error"), [(_Fails, "RuntimeError: the device is gone"), (_Dies, "its process ended with code -9")]
)
def test_what_a_section_told_before_it_failed_is_kept(kind, error, stub):
    stub(kind)
    told = []
    outcome = process.run_section("checks", SMALL, None, lambda known: told.append(known.state))
    assert (outcome.state, outcome.error, outcome.figures) == ("failed", error, {"half": 1})
    assert told == ["interrupted", "failed"]


def test_ctrl_c_ends_a_section_and_keeps_what_it_told(stub):
    stub(_Waits)
    told = []

    def interrupt(known):
        told.append((known.state, dict(known.figures)))
        if len(told) == 1:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        process.run_section("checks", SMALL, None, interrupt)
    assert time.monotonic() - began < process.END_S
    assert [state for state, _ in told] == ["interrupted", "interrupted"]
    assert not Path(told[-1][1]["folder"]).exists()
