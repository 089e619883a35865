import threading
from pathlib import Path

import pytest

from runtime.loggers.feed import Feed, follow
from runtime.loggers.logger import LoggedRun
from tests.synthetic_run import SyntheticRun, make_run
from workers.record.record_lines import Line
from workers.record.run_log import RunLog

LAYOUT = SyntheticRun().layout


class Kept:
    """A logger that keeps what it gets. It fails at the steps in `failing`, once each."""

    def __init__(self, run_id: str | None = "first", failing: tuple[int, ...] = ()) -> None:
        self.id, self.failing = run_id, list(failing)
        self.runs: list[LoggedRun] = []
        self.lines: list[tuple[str, int]] = []
        self.values: dict[str, float] = {}
        self.closed: list[str] = []

    def open(self, run: LoggedRun) -> "Kept":
        self.runs.append(run)
        return self

    def log(self, line: Line, values: dict[str, float]) -> None:
        if line["step"] in self.failing:
            self.failing.remove(line["step"])
            raise ConnectionError("no way to the server")
        self.lines.append((line["kind"], line["step"]))
        self.values = dict(values)

    def close(self, state: str) -> None:
        self.closed.append(state)


def feed_of(run_dir: Path, logger: Kept) -> Feed:
    return Feed(run_dir, "kept", logger.open, {})


def read_all(feed: Feed) -> None:
    while feed.poll():
        pass


def trained(path: Path, first: int, last: int, resume: int | None = None, loss: float = 1.0) -> None:
    with RunLog(path, LAYOUT, resume) as log:
        for step in range(first, last + 1):
            log.train({"step": step, "loss": loss})


def test_a_logger_gets_every_line_once_in_order_with_its_numbers_by_name(tmp_path: Path) -> None:
    logger = Kept()
    trained(tmp_path, 1, 2)
    feed = feed_of(tmp_path, logger)
    read_all(feed)
    with RunLog(tmp_path, LAYOUT, 2) as log:
        log.eval(
            {"step": 2, "val_bits_per_byte_per_source": {"plays": 2.0}, "max_vio_global_per_layer": [0.5, 1.0, 2.0]}
        )
        read_all(feed)
    assert logger.lines == [("train", 1), ("train", 2), ("eval", 2)]
    assert logger.values == {
        "eval/val_bits_per_byte_per_source/plays": 2.0,
        "eval/max_vio_global_per_layer/layers.1.moe": 0.5,
        "eval/max_vio_global_per_layer/layers.2.moe": 1.0,
        "eval/max_vio_global_per_layer/layers.3.moe": 2.0,
    }


def test_texts_and_nulls_are_left_out_and_truth_is_a_number(tmp_path: Path) -> None:
    logger = Kept()
    with RunLog(tmp_path, LAYOUT) as log:
        log.train({"step": 1, "grad_norm": float("nan"), "bias_checksum": "00ff00ff", "skipped": True, "loss": 2})
    read_all(feed_of(tmp_path, logger))
    assert logger.values == {"train/skipped": 1.0, "train/loss": 2.0}


def test_a_later_process_goes_on_behind_the_last_line_and_with_the_same_id(tmp_path: Path) -> None:
    make_run(tmp_path, SyntheticRun(steps=3, total_steps=6))
    first, second = Kept("abc"), Kept("abc")
    read_all(feed_of(tmp_path, first))
    trained(tmp_path, 4, 5, resume=3)
    read_all(feed_of(tmp_path, second))
    assert [step for kind, step in second.lines if kind == "train"] == [4, 5]
    assert [run.id for run in (*first.runs, *second.runs)] == [None, "abc"]
    assert first.runs[0].settings["balance.law"] == "sign" and first.runs[0].name == tmp_path.name


@pytest.mark.parametrize("read_between", [True, False])
def test_steps_that_a_recovery_makes_anew_are_sent_again(tmp_path: Path, read_between: bool) -> None:
    logger = Kept()
    trained(tmp_path, 1, 4)
    feed = feed_of(tmp_path, logger)
    read_all(feed)
    with RunLog(tmp_path, LAYOUT, 2) as log:  # its file is as long as before
        for step in (3, 4, 5):
            log.train({"step": step, "loss": 1.0})
            if read_between:
                read_all(feed)
    read_all(feed)
    assert [step for _, step in logger.lines] == [1, 2, 3, 4, 3, 4, 5]


def test_what_a_failing_logger_lacked_it_gets_later_and_one_warning_is_given(tmp_path: Path) -> None:
    logger, heard, ended = Kept(failing=(3, 3, 5)), [], threading.Event()
    trained(tmp_path, 1, 5)

    def hear(text: str) -> None:
        heard.append(text)
        if "again, and" in text:
            ended.set()

    follow(feed_of(tmp_path, logger), ended, lambda: "finished", hear, retry_s=0.01)
    assert [step for _, step in logger.lines] == [1, 2, 3, 4, 5]
    assert heard == [
        "kept failed (ConnectionError: no way to the server); the run goes on, and it is tried again",
        "kept takes the metrics again, and has got what it lacked",
    ]
    assert logger.closed[-1] == "finished"


def test_a_logger_that_fails_at_the_end_is_told_of_and_waited_for_no_more(tmp_path: Path) -> None:
    logger, heard, ended = Kept(failing=(2,)), [], threading.Event()
    trained(tmp_path, 1, 2)
    ended.set()
    follow(feed_of(tmp_path, logger), ended, lambda: "finished", heard.append)
    assert len(heard) == 1 and "lacks the last metrics of the run (ConnectionError" in heard[0]


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    logger = Kept()
    trained(tmp_path, 1, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{oops\n[1]\n{"kind": "train", "step": 2}\n{"kind": "train", "step": 3, "time": 4e9')
    read_all(feed_of(tmp_path, logger))
    assert logger.lines == [("train", 1)]
