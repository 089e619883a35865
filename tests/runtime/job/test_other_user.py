"""Another user of the same machine, who connects to every port, neither gets in nor brings a run to false numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user and a network of its own")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_another_user_can_keep_a_gang_from_joining_but_gets_into_none(tmp_path: Path) -> None:
    command = ["unshare", "--net", "--fork", "--kill-child", sys.executable, "-m", "tests.runtime.job.other_user"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True, timeout=340)
    seen = json.loads(done.stdout)
    assert seen["control_answered"] and seen["stores"] == []  # no store of a gang listens
    # Who is connected while the ranks join stops the start, and is named; later it is merely connected.
    assert seen["joining"] == 0 or "where only ranks of this gang may be" in seen["said"], seen["said"]
    assert seen["training"] == 0, seen["trained"]
    assert "routed = sent = received = returned on all 15 steps" in seen["trained"]
