import io

import pytest
from rich.console import Console

from runtime.job.live import LiveView, _curve

STEP = {
    "loss": 2.306, "lr": 3e-3, "grad_norm": 0.41, "step_s": 0.26, "tokens_per_s": 7880.0, "max_vio_batch": 0.131,
    "max_vio_floor": 0.0901, "dead_experts": 1, "control_wait_s": 0.00062,
}  # fmt: skip
EVALUATION = {"step": 2, "val_bits_per_byte": 2.311, "val_loss": 1.602, "max_vio_global": 0.0132}


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=20, color_system=None)


def pipe() -> Console:
    return Console(file=io.StringIO())


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def frame(view: LiveView, width: int = 100) -> str:
    console = screen(width)
    console.print(view._frame())
    return written(console)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pipe_gets_plain_lines_at_most_every_few_seconds_and_the_last_step() -> None:
    console, clock = pipe(), Clock()
    with LiveView(4, console=console, clock=clock) as view:
        for step, clock.now in ((1, 1), (2, 2), (3, 7), (4, 8)):
            view.update({**STEP, "step": step})
    assert written(console).splitlines() == [
        "step 1/4  loss 2.31  MaxVio 0.131 (floor 0.0901)  7.88k tokens/s  left 0:03",
        "step 3/4  loss 2.31  MaxVio 0.131 (floor 0.0901)  7.88k tokens/s  left 0:02",
        "step 4/4  loss 2.31  MaxVio 0.131 (floor 0.0901)  7.88k tokens/s  left 0:00",
    ]


def test_a_pipe_gets_evaluations_and_events_at_once_and_unwrapped() -> None:
    console = pipe()
    long = "coordinator lost [bold]not markup[/bold] " + "x" * 200
    with LiveView(4, console=console) as view:
        view.eval(EVALUATION)
        view.event(long)
    assert written(console).splitlines() == [
        "step 2/4  held out: 2.31 bits/byte  loss 1.60  MaxVio_global 0.0132", long,
    ]  # fmt: skip


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_never_gets_control_codes(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    console = pipe()
    assert console.is_terminal  # what rich believes of the pipe now
    with LiveView(2, console=console) as view:
        view.update({**STEP, "step": 1})
        view.eval(EVALUATION)
        view.event("note")
    assert "\x1b" not in written(console) and written(console).count("\n") == 3


def test_a_terminal_shows_loss_balance_and_time_left() -> None:
    clock = Clock()
    view = LiveView(100, console=screen(), live=True, clock=clock)
    for step, clock.now, loss in ((1, 1, 4.0), (2, 2, 2.306)):
        view.update({**STEP, "step": step, "loss": loss})
    shown = frame(view)
    for text in (
        "2/100  0:02, left 1:38",
        "2.31",
        "█▁",
        "floor 0.0901",
        "dead experts 1",
        "7.88k",
        "260 ms a step",
        "0.24 %",
    ):
        assert text in shown, text


def test_a_terminal_keeps_evaluations_and_events_above_the_view() -> None:
    console = screen()
    with LiveView(4, console=console, live=True) as view:
        view.update({**STEP, "step": 1})
        view.eval(EVALUATION)
        view.event("checkpoint at step 2")
    assert "2.31 bits/byte" in written(console) and "checkpoint at step 2" in written(console)
    assert "\x1b[?25h" in written(console)  # the cursor is shown again


@pytest.mark.parametrize("width", [20, 40, 71, 72, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    view = LiveView(100_000, console=screen(width), live=True)
    for step in range(1, 50):
        view.update({**STEP, "step": step, "loss": 5 - step / 20})
    lines = frame(view, width).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= width
    assert ("floor" in lines[2]) is (width >= 72)


def test_a_device_whose_peak_is_known_shows_how_much_of_it_is_used() -> None:
    view = LiveView(4, console=screen())
    view.update({**STEP, "step": 1, "mfu": None})
    assert "MFU" not in frame(view)
    view.update({**STEP, "step": 2, "mfu": 0.412})
    assert "MFU 41.2 %" in frame(view)


def test_before_the_first_step_the_bar_stands_alone() -> None:
    clock = Clock()
    view = LiveView(10, done_steps=4, console=screen(), live=True, clock=clock)
    clock.now = 3
    assert "4/10  0:03, left -:--" in frame(view) and "loss" not in frame(view)


def test_time_left_of_a_resumed_run_counts_its_own_steps_only() -> None:
    clock = Clock()
    view = LiveView(100, done_steps=90, console=screen(), live=True, clock=clock)
    clock.now = 4
    view.update({**STEP, "step": 92})
    assert "left 0:16" in frame(view)  # 8 more at 2 s a step


def test_a_skipped_step_shows_what_there_is() -> None:
    view = LiveView(10, console=screen(), live=True)
    view.update({**STEP, "step": 1, "loss": None, "grad_norm": None})
    assert "grad norm n/a" in frame(view)


def test_a_small_curve_spans_all_steps_in_a_fixed_width() -> None:
    assert _curve([1.0, 2.0, 3.0]) == "▁▅█"
    assert _curve([5.0, float("nan"), 5.0]) == "▁▁"
    assert _curve([float("nan")]) == ""
    assert len(_curve([float(step) for step in range(1000)])) == 32


def test_the_last_checkpoint_shows_how_far_it_is_until_its_event_comes() -> None:
    console, clock = pipe(), Clock()
    with LiveView(4, console=console, clock=clock) as view:
        view.update({**STEP, "step": 4})
        for clock.now in (1, 6, 7, 12):
            view.saving(f"saving: {clock.now} s")
        view.event("checkpoint: step 4")
    assert written(console).splitlines()[1:] == ["saving: 6 s", "saving: 12 s", "checkpoint: step 4"]
    view = LiveView(4, console=screen(), live=True)
    view.saving("saving: half of it")
    assert "saving: half of it" in frame(view)
    view.event("checkpoint: step 4")
    assert "saving" not in frame(view)
