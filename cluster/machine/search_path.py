"""Where Ray's workers look for modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dispatch.own_packages import ROOT, hiding_module

if TYPE_CHECKING:
    from ray.job_config import JobConfig


def job_config() -> JobConfig:
    """For ray.init: workers import our packages from where this process did, whatever lies in its working directory."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _OursFirst()  # noqa: SLF001 Ray has no public way to say it.
    return config


class _OursFirst(list[str]):
    """The folders that ray.init adds to the path of its workers: the driver's script's, and its working directory.

    A worker puts each entry in front of those before it, so the last one is searched first. Ours is added only where
    another folder hides a package of ours: where it is site-packages, it does not belong before the standard library.
    """

    def extend(self, folders: Iterable[str]) -> None:
        given = list(folders)
        super().extend(given)
        if any(hiding_module(Path(folder)) for folder in given):
            self.append(str(ROOT))
