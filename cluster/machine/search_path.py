"""Where Ray's workers look for modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dispatch.own_packages import ROOT, hiding_module

if TYPE_CHECKING:
    from ray.job_config import JobConfig


def job_config() -> JobConfig:
    """For ray.init: workers import our packages from where this process did, not from its working directory."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _OursFirst()  # noqa: SLF001 Ray has no public way to say it.
    return config


class _OursFirst(list[str]):
    """The list to which ray.init adds folders for its workers' sys.path: the driver script's, and the current one.

    Ray's worker inserts each entry at the front of sys.path, so the last one is searched first. Our folder is appended
    only if one of the others hides a package of ours. It may be site-packages, which should not be searched before the
    standard library.
    """

    def extend(self, folders: Iterable[str]) -> None:
        given = list(folders)
        super().extend(given)
        if any(hiding_module(Path(folder)) for folder in given):
            self.append(str(ROOT))
