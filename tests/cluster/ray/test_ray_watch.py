"""When a joined head falls silent: the driver's patience, and that all ends before Ray's client aborts the driver."""

import socket
import time

import pytest

from cluster.failures.calls import SAVED_BY_S, call_all
from cluster.ray import ray_watch
from cluster.ray.ray_watch import HEAD_SILENT_S, RayDied, RayWatch

CLIENT_ABORTS_S = 60.0  # ray's gcs_rpc_server_reconnect_timeout_s


def test_a_silent_head_counts_as_dead_from_its_first_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "HEAD_SILENT_S", 0.3)
    monkeypatch.setattr(ray_watch, "PROBE_EVERY_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as head:
        watch = RayWatch({}, f"127.0.0.1:{head.getsockname()[1]}")
        watch.check()
        assert watch.can_be_asked()
    fell_silent = time.monotonic()
    with pytest.raises(RayDied, match=r"the head of the Ray cluster at 127\.0\.0\.1:\d+ has not answered") as caught:
        while time.monotonic() < fell_silent + 10:
            watch.check()
            time.sleep(0.02)
    assert 0 <= caught.value.since - fell_silent < time.monotonic() - fell_silent - 0.2


def test_the_ranks_get_their_time_from_the_first_sign_and_the_driver_some_to_close(ray_session: object) -> None:
    import ray

    assert HEAD_SILENT_S + 10 < SAVED_BY_S < CLIENT_ABORTS_S - 15
    died = RayDied("the head has not answered", time.monotonic() - SAVED_BY_S + 1)
    told: list[float] = []

    def check() -> None:
        raise died

    @ray.remote
    def never_ends() -> None:
        time.sleep(30)

    call = never_ends.remote()
    began = time.monotonic()
    with pytest.raises(RayDied) as caught:
        call_all([None], "train", [call], check_ray=check, on_ray_died=lambda: told.append(time.monotonic()))  # type: ignore[list-item]
    assert caught.value is died and len(told) == 1
    assert 0.5 < time.monotonic() - began < 5
    ray.cancel(call, force=True)
