"""A real Slurm, Debian's, on machines of namespaces: the controller on machine 0, a daemon on each, in one partition.

What a machine has of its own (sockets, spool, Ray's files) lies in a file system of its own at the same path on all.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from runtime.commands.chaos.machines import Machine, Machines

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CPUS = 2  # Of each machine, as Slurm is told; the host has them.
START_S = 20.0

# A site would have no such haste: a node is down after some 12 s of silence (SlurmdTimeout is 300 s by default), a job
# that was taken back starts 6 s later (cred_expire 120 s). Slurm's own cgroups would need those of the host.
SETTINGS = """\
ClusterName=trimtab
SlurmctldHost={head}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={local}/munge.socket,cred_expire=5
StateSaveLocation={local}/state
SlurmdSpoolDir={local}/slurmd
SlurmctldPidFile={local}/slurmctld.pid
SlurmdPidFile={local}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=5
MessageTimeout=3
TCPTimeout=1
KillWait=5
"""


def why_no_slurm() -> str | None:
    """Why no Slurm can be started here, or None. Tests skip with it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Slurm needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge" if missing else None


class Slurm:
    """Started on entering booted machines; ends with them.

    Args:
        folder: of this Slurm alone, with a short path; all machines see it, except for `local` in it, which each has of
            its own.
        environment: of the daemons and of whoever submits.
    """

    def __init__(self, machines: Machines, folder: Path, environment: dict[str, str]) -> None:
        self.machines, self.folder, self.local = machines, folder, folder / "local"
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf"), "RAY_TMPDIR": str(self.local)}
        self.local.mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        nodes = [f"NodeName={each.name} NodeAddr={each.address} CPUs={CPUS} RealMemory=8192" for each in machines]
        text = SETTINGS.format(head=machines[0].name, folder=folder, local=self.local)
        (folder / "slurm.conf").write_text("\n".join([text, *nodes, "PartitionName=all Nodes=ALL Default=YES", ""]))

    def start(self) -> None:
        """Return once all machines are idle."""
        for machine in self.machines:
            self._run(machine, "mount", "-t", "tmpfs", "local", str(self.local))
            self._munge(machine)
        (machine := self.machines[0]).run(["mkdir", str(self.local / "state")])
        self._run(machine, "slurmctld")
        for machine in self.machines:
            self._run(machine, "slurmd")
        idle = f"idle {len(self.machines)}"
        self.wait_for(lambda: idle in self._run(self.machines[0], "sinfo", "-h", "-o", "%T %D"), START_S)

    def submit(self, script: Path) -> str:
        """The number of the job; what it prints is in `output_of`."""
        home = self.environment["HOME"]
        return self._run(self.machines[0], "sbatch", "--parsable", f"--chdir={home}", str(script)).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, NodeList and many more."""
        shown = self._run(self.machines[0], "scontrol", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def has_ended(self, number: str) -> bool:
        """Whether a job will not run again, however it went."""
        return self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

    def output_of(self, number: str) -> str:
        """What a job printed, or why there is nothing."""
        path = Path(self.environment["HOME"]) / f"slurm-{number}.out"
        return path.read_text() if path.exists() else f"{path.name} is not there"

    def wait_for(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Return once it holds.

        Raises:
            TimeoutError: it does not after so many seconds; with the controller's log.
        """
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "slurmctld.log").read_text()[-4000:])
            time.sleep(0.1)

    def _munge(self, machine: Machine) -> None:
        own = [f"--{name}={self.local}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._run(machine, "munged", "--force", f"--key-file={self.folder / 'munge.key'}", *own)

    def _run(self, machine: Machine, *command: str) -> str:
        done = machine.run(command, env=self.environment)
        assert done.returncode == 0, f"{machine.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout
