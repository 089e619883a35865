"""The batch script of `trimtab cluster manifest slurm`, run by Slurm itself.

machine0 controller, rank 0    machine1 rank 1, then lost    machine2 spare, then rank 1
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.commands.chaos.machines import Machines
from runtime.commands.chaos.namespaces import why_not
from tests.ray_fixture import ROOT
from tests.runtime.commands.cluster.launched import Place, new_place, programs_in
from tests.runtime.commands.cluster.run_check import check_every_step_once, nodes_of_ranks, steps_done
from tests.runtime.commands.cluster.slurm import Slurm, why_no_slurm

REASON = why_not() or why_no_slurm()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STEPS = 60
LIMIT_S = 300.0  # Of each half of the job; both take a quarter of it on idle cores.


@pytest.fixture
def place() -> Iterator[Place]:
    place = new_place()
    yield place
    place.clean()


def environment(place: Place) -> dict[str, str]:
    """That of a user with an installation.

    After the run the other nodes wait a minute, by default, for the head's return; `ray stop` there takes up to 16 s.
    """
    path = f"{programs_in(place.folder / 'bin')}:/usr/sbin:/usr/bin:/sbin:/bin"
    return place.environment(PATH=path, RAY_gcs_rpc_server_reconnect_timeout_s="20")


def write_script(place: Place) -> Path:
    sizes = ["--nodes", "2", "--cpus-per-node", "2", "--memory-per-node", "4"]
    files = ["--shared", str(place.folder / "shared"), "--out", str(place.folder / "job.sh")]
    data = ["--data.path", str(ROOT / "workers"), "--run.eval_every", "0"]
    training = ["--config", "tiny", "--steps", str(STEPS), "--run.checkpoint_every", "10", *data]
    assert main(["cluster", "manifest", "slurm", *sizes, *files, "--", *training]) == 0
    return place.folder / "job.sh"


def test_a_job_that_lost_a_node_is_queued_again_and_its_run_goes_on(place: Place) -> None:
    with Machines(3) as machines:
        slurm = Slurm(machines, place.folder, environment(place))
        slurm.start()
        job = slurm.submit(write_script(place))
        run_dir = place.folder / "shared" / "runs" / f"trimtab-{job}"
        try:
            slurm.wait_for(lambda: steps_done(run_dir) > 12 or slurm.has_ended(job), LIMIT_S)
            machines.network.cut(1)  # as a power cut: nobody is told
            machines[1].kill()
            slurm.wait_for(lambda: slurm.has_ended(job), LIMIT_S)
        finally:
            print(slurm.output_of(job))
        check_job(slurm, job)
        check_no_leftovers(place, machines)
    check_every_step_once(run_dir, STEPS)
    assert nodes_of_ranks(run_dir) == [["10.231.0.10", "10.231.0.11"], ["10.231.0.10", "10.231.0.12"]]


def check_job(slurm: Slurm, job: str) -> None:
    ended = slurm.job(job)
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "1", "machine[0,2]")


def check_no_leftovers(place: Place, machines: Machines) -> None:
    assert list((place.folder / "home" / ".trimtab").iterdir()) == []  # the job's token
    for machine in (machines[0], machines[2]):
        left = [each.command for each in machine.processes() if "slurm" not in each.command.split("/")[-1]]
        assert [each for each in left if not each.startswith("munged")] == []
