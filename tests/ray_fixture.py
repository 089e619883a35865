"""The one local Ray that all tests of a process share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # Ray takes a second to import, and most tests do without
    from cluster.ray.session import RaySession

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_session() -> "Iterator[RaySession]":
    """Two logical CPUs hold any number of workers here, and only two processes are started ahead."""
    from cluster.config import ClusterConfig
    from cluster.ray.session import RaySession

    with pytest.MonkeyPatch.context() as patch:
        # Workers must find this tree, and the test modules in it, wherever pytest was started.
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        with RaySession.open(ClusterConfig(num_workers=2, device="cpu")) as session:
            yield session
