"""`trimtab doctor cluster` as a user runs it: on this machine, and on three of namespaces with a slow link."""

import json
import subprocess
import sys

import psutil
import pytest

from runtime.cli import main
from runtime.commands.chaos.machines import Machines
from runtime.commands.chaos.namespaces import why_not
from tests.ray_machines import ray_on

COMMAND = [sys.executable, "-c", "import sys; from runtime.cli import main; sys.exit(main())", "doctor", "cluster"]


def test_this_machine_is_examined_and_sound_and_its_ranks_exchange(ray_session, tmp_path, capsys):
    before = psutil.Process().children(recursive=True)
    code = main(
        ["doctor", "cluster", "--workers", "4", "--ep-size", "2", "--device", "cpu", "--json", f"{tmp_path}/d.json"]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.out
    assert "starting 4 ranks" in printed.err  # progress
    whole = json.loads((tmp_path / "d.json").read_text())
    assert "nothing wrong was found" in printed.out
    assert sorted(whole["nodes"]) == ["127.0.0.1", "driver"]
    assert whole["nodes"]["127.0.0.1"]["sources"] == whole["nodes"]["driver"]["sources"]
    assert abs(whole["clocks"]["127.0.0.1"]["offset_s"]) < 0.5
    assert [group["ranks"] for group in whole["groups"]] == [[0, 1], [2, 3]]
    assert all(group["bytes_per_s"] > 1e5 and 0 < group["small_s"] < 1 for group in whole["groups"])
    assert whole["findings"] == []
    gone = [process for process in psutil.Process().children(recursive=True) if process not in before]
    psutil.wait_procs(gone, timeout=60)
    assert not [process for process in gone if process.is_running() and "ray::" in " ".join(process.cmdline())]


def test_ranks_that_cannot_be_placed_are_a_finding_and_the_exit_code_says_so(ray_session, capsys):
    assert main(["doctor", "cluster", "--device", "cuda"]) == 1
    printed = capsys.readouterr().out
    assert "error: process group: 2 workers need 0.01 CPU, 1 GPU each" in printed
    assert "1 node\n" in printed  # the rest is told all the same


def test_sizes_that_do_not_divide_and_targets_that_do_not_exist_are_refused(capsys):
    assert main(["doctor", "cluster", "--workers", "3", "--ep-size", "2"]) == 2
    assert "--ep-size (2) must divide --workers (3)" in capsys.readouterr().err
    assert main(["doctor", "cluster", "--ep-size", "3"]) == 2
    assert "--ep-size (3) must divide --workers (2)" in capsys.readouterr().err
    assert main(["doctor", "patient"]) == 2
    assert "cluster" in capsys.readouterr().err


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.slow
def test_on_three_machines_the_slow_link_and_then_the_missing_one_are_named(tmp_path):
    with Machines(3, disk_bytes=2**28) as machines, ray_on(machines, tmp_path / "token") as cluster:
        machines.network.limit(2, 20 * 10**6)
        done = machines[0].run([*COMMAND, "--address", cluster.address], env=cluster.env, timeout_s=300)
        assert done.returncode == 1, done.stderr
        slow = machines[2].address
        assert f"error: {slow}: sends and receives 2." in done.stdout, done.stdout
        assert done.stdout.count("error: ") == 1  # no other link is called slow
        assert done.stdout.count(" µs*") + done.stdout.count(" ms*") == 4
        assert "3 ranks on cpu joined" in done.stdout
        machines.network.limit(2, None)
        # Of the links between them, one is missing, in both directions, and Ray's head does not notice.
        machines[1].run(["ip", "route", "add", "blackhole", f"{machines[2].address}/32"])
        done = machines[0].run([*COMMAND, "--address", cluster.address], env=cluster.env, timeout_s=300)
        assert done.returncode == 1, done.stderr
        assert f"error: {machines[1].address} to {slow}: no connection: " in done.stdout, done.stdout
        assert "error: process group: " in done.stdout


def test_help_names_every_option(capsys):
    assert main(["doctor", "cluster", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--address", "--workers", "--ep-size", "--path", "--json"))


def test_a_wrong_address_is_said_at_once():
    done = subprocess.run(
        [*COMMAND, "--address", "127.0.0.1:1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "nothing answers at 127.0.0.1:1" in done.stderr
