"""`trimtab chaos` as a user runs it: real machines, a real run, real faults, and nothing left of it."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from runtime.cli import main
from runtime.commands.chaos.namespaces import why_not
from tests.ray_fixture import ROOT

pytestmark = pytest.mark.slow

needs_machines = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@contextmanager
def start(out: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running `trimtab chaos quick`; where the test fails, it is interrupted rather than waited for to its end."""
    command = [sys.executable, "-m", "runtime", "chaos", "quick", "--seed", "1", "--out", str(out), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)


@needs_machines
def test_a_run_comes_through_four_faults_as_if_nothing_had_been_and_nothing_is_left(tmp_path):
    out = tmp_path / "out"
    # Of this seed: the driver killed, a node killed, a worker killed in its dispatch, the disk full.
    with start(out, "--faults", "4", "--keep") as process:
        told = process.communicate(timeout=580)[0]
    assert process.returncode == 0, told
    found = json.loads((out / "chaos.json").read_text())
    trials = {trial["fault"]["kind"]["name"]: trial for trial in found["trials"]}
    assert set(trials) == {"kill driver", "kill node", "kill in dispatch", "fill disk"}
    assert all(trial["verdict"] == "survived" for trial in trials.values())
    for name in ("kill driver", "kill node", "kill in dispatch"):
        assert 0 < trials[name]["detected_s"] < trials[name]["recovered_s"]
        assert 0 <= trials[name]["redone"] <= 12  # none, where it struck right after a checkpoint
    steps = [json.loads(line)["step"] for line in (out / "kept" / "chaos" / "metrics.jsonl").open()]
    compared = found["num_compared"]
    assert steps[-1] > 48 and compared["steps and evaluations"] > len(
        steps
    )  # those that were made anew are compared too
    assert compared["records of load and statistics"] > 2 * len(set(steps)) - 2 and compared["tensors"] > 100
    assert found["mismatches"] == found["leftovers"] == []
    assert (out / "chaos.png").stat().st_size > 10_000
    assert "| 3 | 36 | kill in dispatch | rank 1 | survived |" in (out / "chaos.md").read_text()
    events = [json.loads(line) for line in (out / "kept" / "chaos" / "events.jsonl").open()]
    assert_nothing_left(next(Path(event["path"]).parents[3] for event in events if event["event"] == "checkpoint"))


@needs_machines
def test_ctrl_c_tears_everything_down(tmp_path):
    with start(tmp_path / "out") as process:
        process.stdout.readline()  # of the plan; the next line comes once the cluster is up
        assert "cluster up" in process.stdout.readline()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 10
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=300)[0]
    assert process.returncode == 130, told
    psutil.wait_procs(family, timeout=60)
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def assert_nothing_left(folder: Path) -> None:
    """Neither the folder of the testbed, nor a process that names it."""
    assert folder.name.startswith("c-") and not folder.exists()
    commands = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(folder) in command]


def test_what_cannot_be_played_is_refused(capsys):
    assert main(["chaos", "worldwide"]) == 2
    assert "quick" in capsys.readouterr().err
    assert main(["chaos", "quick", "--machines", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    refusal = (
        "import os, runtime.commands.chaos.campaign, runtime.commands.chaos.command; "
        "from runtime.commands.command import run_command; "
        "os.setuid(65534); run_command('runtime.commands.chaos.command', 'trimtab chaos', ['quick'])"
    )
    done = subprocess.run([sys.executable, "-c", refusal], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "InvalidValue: machines need root: they are network namespaces" in done.stderr
