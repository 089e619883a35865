"""A Ray that starts slowly is waited for; one that fails to start says so with its log."""

import subprocess
import sys

import pytest
import ray
from ray._private import services

from cluster.config import ClusterConfig
from cluster.ray.local_ray import RayNotStarted, _end_of_logs, _wait_for_node
from cluster.ray.session import RaySession


def test_a_raylet_that_is_slow_to_register_is_waited_for_and_a_dead_one_is_not():
    answers = iter([RuntimeError("not yet"), RuntimeError("not yet"), {"node": 1}])

    def get_node(*_: str) -> dict[str, int]:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    assert _wait_for_node(get_node, [], 60.0, "", "") == {"node": 1}
    answers = iter([RuntimeError("not yet")] * 2)
    with pytest.raises(TimeoutError, match="its raylet has not registered after 0 s"):
        _wait_for_node(get_node, [], 0.0, "", "")
    with subprocess.Popen(["raylet", "-c", "exit(3)"], executable=sys.executable) as raylet:
        raylet.wait()
        answers = iter([RuntimeError("not yet")])
        with pytest.raises(ChildProcessError, match="its raylet ended with exit code 3"):
            _wait_for_node(get_node, [raylet], 60.0, "", "")


def test_of_the_logs_the_complaints_are_shown(tmp_path):
    (logs := tmp_path / "r" / "session_2026-11-28_1" / "logs").mkdir(parents=True)
    (logs / "raylet.out").write_text(
        "[2026-11-28 07:15:40,687 I 1 1] (raylet) main.cc:1: fine\nGlobal stats: 4 total\n"
        "[2026-11-28 07:15:41,687 E 1 1] (raylet) main.cc:2: no room here\n"
    )
    (logs / "gcs_server.err").write_text("Aborted\n")
    (tmp_path / "r" / "session_latest").symlink_to(logs.parent)
    gcs, raylet = _end_of_logs(tmp_path).splitlines()[1:]
    assert gcs == "  gcs_server.err: Aborted" and raylet.endswith("main.cc:2: no room here")


@pytest.mark.slow
def test_a_ray_that_does_not_start_ends_in_words_with_its_log_and_leaves_nothing(monkeypatch, tmp_path):
    if ray.is_initialized():
        pytest.skip("another test's Ray runs in this process")
    (raylet := tmp_path / "raylet").write_text("#!/bin/sh\nexit 3\n")
    raylet.chmod(0o755)
    monkeypatch.setattr(services, "RAYLET_EXECUTABLE", str(raylet))
    with (
        pytest.raises(
            RayNotStarted, match=r"its raylet ended with exit code 3\n(.|\n)*--cluster.start_timeout_s \(120\)"
        ),
        RaySession.open(ClusterConfig(num_workers=1, device="cpu")),
    ):
        pass
    assert not ray.is_initialized()
