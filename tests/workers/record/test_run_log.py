import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dispatch.errors import InvalidValue
from dispatch.layout import LoadLayout
from workers.record.run_fence import RunDirectoryLost
from workers.record.run_log import RunLog, read_events, read_load_history, read_metrics

LAYOUT = LoadLayout(("layers.1.moe", "layers.2.moe"), (2, 3), (True, False))  # N = 5


def new_log(path: Path, **options) -> RunLog:
    return RunLog(path, options.pop("layout", LAYOUT), **options)


def write_steps(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.load(step, np.arange(5) * step, np.arange(5) / 8)
        log.train({"step": step, "loss": step / 4})


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)[0]]


def test_lines_read_back_as_they_were_written(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        log.train({"step": 1, "loss": 2.5, "time": 7.0, "skipped": False, "bias_checksum": "00ff00ff"})
        log.eval({"step": 1, "val_bits_per_byte_per_source": {"plays": 2.0}})
        log.event("checkpoint", step=1, path=tmp_path / "checkpoints")
    train, evals = read_metrics(tmp_path)
    assert train == [
        {"kind": "train", "time": 7.0, "step": 1, "loss": 2.5, "skipped": False, "bias_checksum": "00ff00ff"}
    ]
    assert evals[0]["kind"] == "eval" and evals[0]["val_bits_per_byte_per_source"] == {"plays": 2.0}
    assert evals[0]["time"] > 1e9
    assert [(line["event"], line["path"]) for line in read_events(tmp_path)] == [
        ("checkpoint", str(tmp_path / "checkpoints"))
    ]


def test_lines_are_strict_json_even_of_what_json_lacks(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        log.train({"step": 1, "grad_norm": float("inf"), "list": [float("nan"), np.float32(0.5), torch.tensor([3, 4])]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["grad_norm"] is None and line["list"] == [None, 0.5, [3, 4]]


def test_a_line_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    write_steps(log, 1, 2)
    assert steps_of(tmp_path) == [1, 2]
    assert read_load_history(tmp_path).steps.tolist() == [1, 2]
    log.close()


def test_load_history_keeps_layers_of_different_sizes(tmp_path: Path) -> None:  # B9
    with new_log(tmp_path) as log:
        log.load(3, torch.tensor([1, 2, 3, 4, 2**40]), torch.tensor([0.5, -0.5, 0.1, 0.0, -0.1]))
    steps, counts, bias, layout = read_load_history(tmp_path)
    assert steps.tolist() == [3] and layout == LAYOUT
    assert counts.dtype == np.int64 and counts.tolist() == [[1, 2, 3, 4, 2**40]]
    assert bias.dtype == np.float32 and bias.tobytes() == np.array([0.5, -0.5, 0.1, 0, -0.1], "<f4").tobytes()


@pytest.mark.parametrize("layout", [LAYOUT, LoadLayout((), (), ())])
def test_load_history_is_readable_before_the_first_step_and_without_experts(tmp_path: Path, layout: LoadLayout) -> None:
    with new_log(tmp_path, layout=layout) as log:
        assert read_load_history(tmp_path).counts.shape == (0, layout.total)
        log.load(1, np.zeros(layout.total), np.zeros(layout.total))
    assert read_load_history(tmp_path).counts.shape == (1, layout.total)


def test_a_line_or_record_torn_by_a_crash_is_left_out(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2)
    for name in ("metrics.jsonl", "load/history.bin"):
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 3)
    assert steps_of(tmp_path) == [1]
    assert read_load_history(tmp_path).steps.tolist() == [1]


@pytest.mark.parametrize("damaged", ["[]", "{", '{"names": [], "num_experts": 3, "balanced": []}'])
def test_a_damaged_layout_is_named(damaged: str, tmp_path: Path) -> None:
    new_log(tmp_path).close()
    (tmp_path / "load" / "layout.json").write_text(damaged)
    with pytest.raises(InvalidValue, match=r"layout\.json is damaged"):
        read_load_history(tmp_path)


def test_an_event_whose_time_is_true_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "started", "time": true}\n')
    with pytest.raises(InvalidValue, match=r"events\.jsonl, line 1 is damaged"):
        read_events(tmp_path)


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], "{oops\n", lines[1]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)


def test_resuming_moves_later_steps_aside_and_keeps_steps_unique(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        log.eval({"step": 0})
        write_steps(log, 1, 2, 3, 4)
        log.eval({"step": 4})
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "load/history.bin").read_bytes()
    with new_log(tmp_path, resume_step=2) as log:
        assert steps_of(tmp_path) == [1, 2]
        write_steps(log, 3)
    with new_log(tmp_path, resume_step=3) as log:
        write_steps(log, 4, 5)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_metrics(tmp_path)[1]] == [0]
    history = read_load_history(tmp_path)
    assert history.steps.tolist() == [1, 2, 3, 4, 5] and history.counts[:, 1].tolist() == [1, 2, 3, 4, 5]
    moved = (tmp_path / "metrics.superseded.jsonl").read_bytes()
    assert before[0].endswith(moved) and [json.loads(line)["step"] for line in moved.splitlines()] == [3, 4, 4]
    assert before[1].endswith((tmp_path / "load/history.superseded.bin").read_bytes())
    assert (tmp_path / "load/history.superseded.bin").stat().st_size == len(before[1]) // 2


def test_resuming_moves_torn_lines_aside_and_never_joins_them(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        write_steps(log, 1, 2)
        log.event("started")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"kind": "train", "st')
    with (tmp_path / "load/history.bin").open("ab") as file:
        file.write(b"torn")
    for _ in range(2):  # twice: the torn line in the superseded file must not swallow the next one
        with new_log(tmp_path, resume_step=1) as log:
            write_steps(log, 2)
            log.event("resumed")
    assert steps_of(tmp_path) == [1, 2] and read_load_history(tmp_path).steps.tolist() == [1, 2]
    assert [line["event"] for line in read_events(tmp_path)] == ["started", "resumed", "resumed"]
    assert (tmp_path / "load/history.superseded.bin").stat().st_size == 2 * (8 + 12 * 5)  # whole records only
    aside = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [line[:25] for line in aside] == [
        '{"kind": "train", "time":',
        '{"kind": "train", "st',
        '{"kind": "train", "time":',
    ]


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    new_log(tmp_path).close()
    with pytest.raises(ValueError, match="already holds a run"):
        new_log(tmp_path)


def test_a_run_of_another_model_is_not_continued(tmp_path: Path) -> None:
    new_log(tmp_path).close()
    with pytest.raises(ValueError, match=r"recorded \(2, 3\) experts .* the model has \(2, 4\)"):
        new_log(tmp_path, layout=LoadLayout(LAYOUT.names, (2, 4), LAYOUT.balanced), resume_step=1)


@pytest.mark.parametrize("read", [read_metrics, read_load_history, read_events])
def test_a_folder_without_a_run_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(ValueError, match="it is no run, or one that has not begun to train; give the folder"):
        read(tmp_path / "nothing")


@contextmanager
def disk_that_takes(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond `num_bytes`: a write there is cut short first and then fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_warns_once_and_loses_nothing(tmp_path: Path) -> None:
    heard: list[str] = []
    with new_log(tmp_path, on_warning=heard.append) as log:
        with disk_that_takes(400):
            write_steps(log, *range(1, 21))
            log.sync()
            assert 0 < len(steps_of(tmp_path)) < 20
            assert len(heard) == 1 and "File too large" in heard[0] and "the run goes on" in heard[0]
        log.event("checkpoint")  # any later record brings the missing ones along
        assert steps_of(tmp_path) == list(range(1, 21))
        assert read_load_history(tmp_path).steps.tolist() == list(range(1, 21))
        assert len(heard) == 2 and "complete" in heard[1]


def test_what_a_disk_never_took_is_counted_at_the_end(tmp_path: Path) -> None:
    heard: list[str] = []
    log = new_log(tmp_path, on_warning=heard.append)
    with disk_that_takes(0):
        log.event("started")
        log.close()
    assert len(heard) == 2 and "bytes are lost" in heard[1]


def test_reading_a_run_needs_no_torch() -> None:
    code = "import sys, workers.record.run_log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_whose_directory_was_replaced_writes_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with new_log(run) as log:
        write_steps(log, 1)
        run.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", run)
        with pytest.raises(RunDirectoryLost, match=r"metrics\.jsonl was removed or replaced"):
            log.train({"step": 2})
    assert steps_of(run) == steps_of(tmp_path / "moved") == [1]
