"""Machines of namespaces that take ssh: Debian's server on each, and a home of its own for root, who comes by key.

The keys are made for one test and lie in its folder.
"""

import shutil
import subprocess
from pathlib import Path

from runtime.commands.chaos.machines import Machine, Machines

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
SERVER = """\
HostKey {folder}/host_key
PidFile none
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
AuthorizedKeysFile .ssh/authorized_keys
"""


def why_no_ssh() -> str | None:
    """Why no server can be started here, or None. Tests skip with it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"ssh between machines needs {', '.join(missing)}: apt-get install openssh-server rsync" if missing else None


class SshMachines:
    """Booted machines, between which `ssh root@ADDRESS` works from the one that has the key.

    Args:
        folder: of these machines alone, which all see, except for `home` in it: each has its own, and
            a /run of its own.
        profile: what a login shell there reads first.
    """

    def __init__(self, machines: Machines, folder: Path, profile: str) -> None:
        self.machines, self.folder, self.home = machines, folder, folder / "home"
        self.key = self.home / ".ssh" / "id_ed25519"
        for name in ("host_key", "user_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(make, check=True, stdin=subprocess.DEVNULL, timeout=30)
        (folder / "sshd_config").write_text(SERVER.format(folder=folder))
        (folder / "profile").write_text(profile)
        accounts = [self._account(line) for line in Path("/etc/passwd").read_text().splitlines()]
        (folder / "passwd").write_text("\n".join([*accounts, ""]))

    def serve(self, machine: Machine) -> None:
        """Give a machine, just booted, its home, and let it take ssh."""
        files = f"""
            mount -t tmpfs -o mode=700 home {self.home}
            mount --bind {self.folder}/passwd /etc/passwd
            mount -t tmpfs run /run
            mkdir /run/sshd
            mkdir -m 700 {self.home}/.ssh
            cp {self.folder}/user_key.pub {self.home}/.ssh/authorized_keys
            cp {self.folder}/profile {self.home}/.bash_profile
            touch {self.home}/.bashrc
        """
        self.check(machine, "sh", "-ec", files)
        self.check(machine, shutil.which("sshd") or "sshd", "-f", str(self.folder / "sshd_config"))

    def give_key(self, machine: Machine) -> None:
        """From here on this machine may log in to all."""
        self.check(machine, "cp", "-p", str(self.folder / "user_key"), str(self.key))

    def as_user(self, *command: str) -> list[str]:
        """The command in root's login shell, with nothing of this process's environment."""
        return ["env", "-i", f"HOME={self.home}", "bash", "-lc", 'exec "$0" "$@"', *command]

    def check(self, machine: Machine, *command: str, limit_s: float = 60.0) -> str:
        """Run a command there as the user; what it printed. Fails the test where it fails."""
        done = machine.run(self.as_user(*command), timeout_s=limit_s)
        assert done.returncode == 0, f"{machine.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _account(self, line: str) -> str:
        name, *fields = line.split(":")
        return f"root:{':'.join([*fields[:4], str(self.home), '/bin/bash'])}" if name == "root" else line
