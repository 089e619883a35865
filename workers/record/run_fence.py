"""Checks, before each step that is recorded, that the run still owns its directory.

Needs no torch. Who owns a directory: runtime/runs/run_lock.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dispatch.errors import UserError


class RunDirectoryLost(UserError):
    """The directory of a run was removed, replaced, or taken over by another process while the run went on."""


@dataclass(frozen=True)
class RunFence:
    """The lock file by which a run owns its directory, and the token that the file must hold."""

    lock_file: Path
    token: str

    def check(self) -> None:
        """Raise RunDirectoryLost where the lock file is gone or belongs to another run.

        The file is opened anew each time: NFS checks at an open whether the file has changed on the server.
        """
        run_dir = self.lock_file.parent
        try:
            token = json.loads(self.lock_file.read_bytes())["token"]
        except FileNotFoundError:
            what = "its lock file was removed" if run_dir.is_dir() else "it was removed or renamed"
            raise directory_lost(run_dir, f"{what}, or another process took the run over") from None
        except (ValueError, OSError):
            return  # read while it was being renewed, or the file system fails: no sign that it is another run's
        if token != self.token:
            raise directory_lost(run_dir, "it is another run's")


def directory_lost(run_dir: Path, what: str) -> RunDirectoryLost:
    """The error for a directory that is no longer the run's."""
    return RunDirectoryLost(
        f"the run directory {run_dir} is no longer this run's ({what}); the run stops and writes no more. If the "
        f"directory lies elsewhere now, go on there with: trimtab train --resume DIRECTORY"
    )
