"""Clusters that the command itself has started, in a home and a folder of their own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ray_fixture import ROOT

OWN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


@dataclass(frozen=True)
class Place:
    """A user of this machine, as far as the command can tell: a home, and a folder for nodes."""

    folder: Path

    @property
    def token(self) -> Path:
        return self.folder / "home" / ".trimtab" / "token"

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in OWN}
        own = {"HOME": str(self.folder / "home"), "RAY_TMPDIR": str(self.folder), "PYTHONPATH": str(ROOT)}
        return kept | own | {"PYTHONWARNINGS": "ignore"} | variables

    def run(self, *arguments: str, limit_s: float = 90, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "runtime", *arguments, limit_s=limit_s, **variables)

    def python(self, *arguments: str, limit_s: float = 90, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder / "home",
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def processes(self) -> list[psutil.Process]:
        """Ray's processes that name this place, or descend from one that does."""
        named = [p for p in psutil.process_iter(["cmdline"]) if f"{self.folder}/" in " ".join(p.info["cmdline"] or [])]
        return list({child for p in named if p.is_running() for child in (p, *p.children(recursive=True))})

    def clean(self) -> None:
        self.run("cluster", "down")
        shutil.rmtree(self.folder)


def programs_in(folder: Path) -> Path:
    """A folder for a PATH, with the commands that an installation of the package has: `trimtab` and `ray`."""
    folder.mkdir()
    for name, module in (("trimtab", "runtime"), ("ray", "ray.scripts.scripts")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def new_place() -> Place:
    """Not pytest's own folder, whose path is too long for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))
    (folder / "home").mkdir()
    return Place(folder)


def free_ports() -> tuple[int, int]:
    """One with a free one above it for the head, one for the dashboard."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        head = first.getsockname()[1]
        return (head, second.getsockname()[1]) if head + 1 != second.getsockname()[1] else free_ports()
