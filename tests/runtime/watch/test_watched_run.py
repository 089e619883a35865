import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from runtime.runs.run_lock import LEASE_S
from runtime.watch.follower import Follower, Turns
from runtime.watch.watched_run import WatchedRun
from tests.synthetic_run import SyntheticRun, make_run
from workers.record.run_log import RunLog, append_event

LAYOUT = SyntheticRun().layout


def polled(path: Path) -> WatchedRun:
    run = WatchedRun(path)
    while run.poll():
        pass
    return run


def test_a_run_that_is_not_there_yet_is_not_begun_then_starting_then_running(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = polled(path)
    assert (run.state(), run.summary()["step"], run.facts()["layers"]) == ("not begun", 0, [])
    path.mkdir()
    (path / "run.lock.00000001").write_text("{}")
    run.poll()
    assert run.state() == "starting"
    with RunLog(path, LAYOUT) as log:
        log.event("started", rank_map=[])
        log.train({"step": 1, "loss": 2.0})
        log.load(1, [1] * LAYOUT.total, [0.0] * LAYOUT.total)
    run.poll()
    summary = run.summary()
    assert (summary["state"], summary["step"], summary["latest"]["loss"]) == ("running", 1, 2.0)
    assert run.facts()["layers"] == list(LAYOUT.names)


def test_what_each_rank_is_in_is_shown_while_the_run_is_under_way(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", SyntheticRun(steps=5, total_steps=9))
    append_event(path, "resumed", step=5)
    (path / "run.lock.00000003").write_text("{}")
    run = polled(path)
    assert run.now is None
    now = {"time": 1e9, "ranks": [{"rank": 0, "phase": "combine", "memory_bytes": 5}]}
    (path / "now.json").write_text(json.dumps(now))
    stamp = run.stamp
    assert run.poll() and run.stamp > stamp  # so that the page asks, also where no step is made
    assert run.now == now
    (path / "now.json").write_text("[" * 100_000)
    run.poll()
    assert run.now is None
    (path / "now.json").write_text(json.dumps(now))
    append_event(path, "finished", step=9)
    run.poll()
    assert run.now is None


def test_a_run_whose_process_is_gone_without_a_word_is_told(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", SyntheticRun(steps=5, total_steps=9))
    append_event(path, "resumed", step=5)
    run = polled(path)
    assert run.state() == "gone"  # no lock at all
    lock = path / "run.lock.00000003"
    lock.write_text("{}")
    run.poll()
    assert run.state() == "running"
    before = time.time() - LEASE_S - 1
    os.utime(lock, (before, before))
    stamp = run.stamp
    run.poll()
    assert run.state() == "gone"
    assert run.stamp > stamp  # so that the page hears of it
    append_event(path, "finished", step=9)
    run.poll()
    assert run.state() == "finished"


def test_the_time_left_is_estimated_while_the_run_is_under_way(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", SyntheticRun(steps=30, total_steps=60, finished=False))
    assert polled(path).summary()["left_s"] is None
    append_event(path, "resumed", step=30)
    (path / "run.lock.00000001").write_text("{}")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    summary = polled(path).summary()
    assert summary["left_s"] == pytest.approx(30 * (steps[-1]["time"] - steps[0]["time"]) / 29)
    assert summary["mean"]["experts_s"] == pytest.approx(sum(line["experts_s"] for line in steps) / 30)


def test_a_run_that_resumes_from_an_earlier_step_has_a_new_epoch_and_no_old_steps(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", SyntheticRun(steps=60))
    run = polled(path)
    with RunLog(path, LAYOUT, 40) as log:
        log.event("resumed", step=40)
    run.poll()
    assert run.metrics.last_step == 40  # never without a past in between
    assert (run.epoch, run.metrics.last_step) == (1, 40)
    assert run.metrics.spans(["loss"], 0, 100, 100).last[-1] == 40


def test_a_run_that_is_deleted_while_it_is_watched_may_come_again_as_another(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", SyntheticRun(steps=60))
    run = polled(path)
    assert run.load.last() is not None
    shutil.rmtree(path)
    run.poll()
    assert (run.state(), run.summary()["step"], run.facts()["layers"], run.load.last()) == ("not begun", 0, [], None)
    make_run(path, SyntheticRun(steps=5, num_layers=2))
    run.poll()
    assert (run.state(), run.summary()["step"], len(run.facts()["layers"])) == ("finished", 5, 2)
    (path / "metrics.jsonl").write_bytes(b"")
    run.poll()
    assert (run.state(), run.summary()["step"], run.summary()["share_read"]) == ("finished", 0, 1.0)


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: &x 1\nb: *x", "\x00", "x" * 100_000])
def test_damaged_settings_are_told_and_do_no_harm(tmp_path: Path, text: str) -> None:
    path = make_run(tmp_path / "run")
    (path / "config.yaml").write_text(text)
    facts = polled(path).facts()
    assert facts["settings"] == {}
    assert facts["settings_trouble"] or text == "- 1"


def test_settings_have_names_with_dots(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    settings = polled(path).facts()["settings"]
    assert (settings["model.moe.num_experts"], settings["balance.law"]) == (8, "sign")


def test_the_follower_reads_on_by_itself(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    run = WatchedRun(path)
    with Follower([run], poll_s=0.01):
        assert run.metrics.last_step == 60
        append_event(path, "failed", reason="x")
        give_up = time.monotonic() + 10
        while run.state() != "failed":
            assert time.monotonic() < give_up
            time.sleep(0.01)


def test_watching_writes_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")

    def listing() -> dict[str, tuple[int, int]]:
        return {str(each): (each.stat().st_size, each.stat().st_mtime_ns) for each in sorted(path.rglob("*"))}

    before = listing()
    run = polled(path)
    run.summary(), run.facts(), run.load.last(), run.load.columns(0, 0, 60, 9)
    assert listing() == before


def test_reading_waits_while_a_request_is_answered() -> None:
    turns, order = Turns(), list[str]()

    def read() -> None:
        turns.wait()
        order.append("read")

    with turns.asking(), turns.asking():
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.05)
        order.append("answered")
    thread.join(10)
    assert order == ["answered", "read"]
