import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dispatch.errors import InvalidValue
from runtime.job.job import report_line
from runtime.report import report_page
from runtime.report.chart_style import average
from runtime.report.report import print_summary, write_report
from runtime.report.run_record import Headline, RunRecord, headlines, phase_shares
from runtime.terminal.quantities import duration, milliseconds, percent, short, three_digits
from tests.synthetic_run import SyntheticRun, make_run
from tests.workers.record.test_run_log import disk_that_takes
from workers.record.run_log import append_event


class Page(HTMLParser):
    """Open tags, external addresses, text, and the numbers that it holds for its charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.held: dict = {}
        self.is_held = False
        self.links: list[str] = []
        self.open: list[str] = []
        self.shown = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs) -> None:
        self.is_held = dict(attrs).get("id") == "held"
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.is_held and self.open[-1] == "script":
            self.held = json.loads(data)
        elif self.open and self.open[-1] not in ("script", "style"):
            self.shown += data


def figures(run: Path) -> dict[str, Headline]:
    return {figure.label: figure for figure in headlines(RunRecord.read(run))}


def edit_line(run: Path, number: int, **changes) -> None:
    """Change fields of one training line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [line for line in lines if line["kind"] == "train"][number].update(changes)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything in it: drawn once, as that takes a second."""
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "plays", SyntheticRun(skipped_steps=(4, 5))))


def test_a_whole_run_shows_every_figure_and_holds_every_curve(whole_report: Path) -> None:
    page = Page(whole_report)
    for shown in (
        "Held-out bits per byte",
        "Tokens lost",
        "max(load) / mean(load) − 1",
        "60 of 60 steps",
        "balance.rate",
        "everything else",
        "MaxVio_global",
    ):
        assert shown in page.shown, shown
    assert page.open == []
    assert [chart["title"] for chart in page.held["charts"]] == [
        "Held-out bits per byte by source",
        "Spread of the bias",
    ]
    assert {"loss", "val_loss", "max_vio_batch", "grad_norm", "dispatch_s", "other_s"} <= page.held["curves"][
        "curves"
    ].keys()
    assert page.held["facts"]["layers"] == ["layers.1.moe", "layers.2.moe", "layers.3.moe"]
    assert (page.held["first_load"]["first"], page.held["first_load"]["last"], page.held["last_load"]["last"]) == (
        1,
        10,
        60,
    )


def test_the_page_needs_nothing_from_outside(whole_report: Path) -> None:
    assert Page(whole_report).links == []
    assert not re.search(r"@import|url\((?!#)|<link|\bsrc=", whole_report.read_text(encoding="utf-8"))


def test_the_policy_of_the_page_allows_its_own_scripts_and_style_and_no_others(whole_report: Path) -> None:
    source = whole_report.read_bytes().decode()
    policy = re.search(r'<meta http-equiv="content-security-policy" content="([^"]*)">', source)
    assert policy and source.index(policy[0]) < source.index("<style>") < source.index("<script")
    own = [re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL) for tag in ("script", "style")]
    assert [len(each) for each in own] == [2, 1] and "unsafe" not in policy[1] and "'none'" in policy[1]
    for text in own[0] + own[1]:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy[1]
    assert policy[1].count("sha256-") == 3


def test_the_time_of_all_steps_is_shared_out_wholly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plays", SyntheticRun(steps=2))
    edit_line(run, 0, step_s=1.0, experts_s=0.5, dispatch_s=0.25, combine_s=0.0, bias_update_s=0.0, control_wait_s=0.0)
    edit_line(run, 1, step_s=3.0, experts_s=0.5, dispatch_s=None, combine_s=0.0, bias_update_s=0.0, control_wait_s=0.0)
    shares = phase_shares(RunRecord.read(run))
    assert [(name, share) for name, _, share in shares if share] == [
        ("experts", 0.25), ("dispatch", 0.0625), ("everything else", 0.6875),
    ]  # fmt: skip
    assert shares[0][1] == 0.5 and shares[-1][1] == 1.375


LOAD, SOURCES, SPREAD, IMBALANCE = "load", "Held-out bits per byte by source", "Spread of the bias", "max_vio_batch"
CUT_SHORT = {
    "law_none": (SyntheticRun(law="none"), {SPREAD}),
    "two_steps": (SyntheticRun(steps=2, finished=False), {SOURCES}),
    "one_step": (SyntheticRun(steps=1, finished=False), {SOURCES, SPREAD}),
    "no_step": (SyntheticRun(steps=0, finished=False), {LOAD, SOURCES, SPREAD, IMBALANCE}),
    "no_experts": (SyntheticRun(num_layers=0), {LOAD, SPREAD}),
}


@pytest.mark.parametrize("case", CUT_SHORT)
def test_a_run_that_lacks_something_is_reported_without_it(tmp_path: Path, case: str) -> None:
    made, missing = CUT_SHORT[case]
    run = make_run(tmp_path / case, made)
    page = Page(write_report(run))
    has = {chart["title"] for chart in page.held["charts"]} | page.held["curves"]["curves"].keys()
    has |= {LOAD} if page.held["last_load"] else set()
    assert {LOAD, SOURCES, SPREAD, IMBALANCE} - has == missing
    assert page.open == [] and "nan" not in page.shown.lower()
    print_summary(run, Console(quiet=True, force_terminal=True))


def test_a_run_without_any_record_is_still_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "empty", SyntheticRun(steps=0))
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).write_text("")
    (run / "config.yaml").unlink()
    assert "No step was recorded" in Page(write_report(run)).shown


def test_the_state_is_that_of_the_newest_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plays", SyntheticRun(steps=3, finished=False))
    assert RunRecord.read(run).state == "interrupted"
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1.7e9, "event": "resumed"}\n')
    assert RunRecord.read(run).state == "running"


def test_lost_tokens_are_counted_and_their_first_step_named(tmp_path: Path) -> None:  # P17
    run = make_run(tmp_path / "plays", SyntheticRun(steps=10))
    assert figures(run)["Tokens lost"] == Headline(
        "Tokens lost",
        "0",
        "of 30,720 (token, expert) assignments: routed = sent = received = returned on all 10 steps",
        verdict=True,
    )  # 10 steps x 3 layers x 512 tokens x 2 experts
    edit_line(run, 6, tokens_returned=3000)
    lost = figures(run)["Tokens lost"]
    assert lost.value == "72" and lost.verdict is False and "1 of 10 steps, first at step 7" in lost.note


def test_a_bias_other_than_the_logged_checksum_is_shown(tmp_path: Path) -> None:  # P13
    run = make_run(tmp_path / "plays", SyntheticRun(steps=10))
    assert figures(run)["Bias checksums equal"].verdict is True
    edit_line(run, 4, bias_checksum="00000000")
    wrong = figures(run)["Bias checksums equal"]
    assert wrong.value == "9 of 10 steps" and wrong.verdict is False and "first at step 5" in wrong.note


def test_a_repaired_bias_is_shown_though_rank_0_held_the_right_one(tmp_path: Path) -> None:  # P13
    run = make_run(tmp_path / "plays", SyntheticRun(steps=10))
    append_event(run, "bias_repaired", step=7, ranks=[1])
    wrong = figures(run)["Bias checksums equal"]
    assert wrong.value == "9 of 10 steps" and wrong.verdict is False
    assert "a rank routed by another bias, first at step 7" in wrong.note


def test_a_last_line_whose_bias_was_not_recorded_is_no_wrong_checksum(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plays", SyntheticRun(steps=10))
    os.truncate(run / "load/history.bin", (run / "load/history.bin").stat().st_size - 1)
    checksums = figures(run)["Bias checksums equal"]
    assert checksums.value == "9 of 9 steps" and checksums.verdict is True


def test_max_vio_is_averaged_over_the_last_50_steps_beside_its_floor(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plays", SyntheticRun(steps=60))
    for number in range(60):
        edit_line(run, number, max_vio_batch=9.0 if number < 10 else 0.2)
    figure = figures(run)["MaxVio_batch"]
    assert figure.value == "0.200"
    assert (
        "last 50 steps" in figure.note and "floor by chance 0.156" in figure.note and "first step 9.00" in figure.note
    )


def test_control_wait_is_a_share_of_the_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plays", SyntheticRun(steps=2))
    edit_line(run, 0, control_wait_s=0.001, step_s=0.3)
    edit_line(run, 1, control_wait_s=0.003, step_s=0.1)
    assert figures(run)["Waiting for the coordinator"].value == "1.0 %"


def test_skipped_steps_are_counted_and_named(whole_report: Path) -> None:  # B37
    assert figures(whole_report.parent)["Skipped steps"].value == "2"
    assert "not finite: weights and bias left as they were; step 4, 5" in Page(whole_report).shown


def test_what_a_user_names_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&c", SyntheticRun(steps=0))
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1.7e9, "event": "failed", "error": "<script>alert(1)</script>"}\n')
    source = write_report(run).read_text(encoding="utf-8")
    assert "<script>alert" not in source and "&lt;script&gt;" in source and "a&lt;b&gt;&amp;c" in source


def test_the_diagnosis_of_a_failure_is_folded_line_by_line_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "hung", SyntheticRun(steps=0))
    with (run / "events.jsonl").open("a") as file:
        event = {"time": 1.7e9, "event": "failed", "reason": "why", "diagnosis": "first\n  <module> second"}
        file.write(json.dumps(event) + "\n")
    source = write_report(run).read_text(encoding="utf-8")
    assert "why<details><summary>diagnosis</summary><pre>first\n  &lt;module&gt; second</pre></details>" in source


def test_writing_again_gives_the_same_page_and_no_leftover(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plays", SyntheticRun(steps=0))
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob("*.tmp"))


def test_the_terminal_summary_fits_80_columns(tmp_path: Path) -> None:
    console = Console(width=80, record=True, force_terminal=True, file=(tmp_path / "out").open("w"))
    print_summary(make_run(tmp_path / "plays"), console)
    text = console.export_text()
    assert "plays: finished. Step 60 of 60, 3 MoE layers of 8 experts, balance.law sign" in text
    assert "60 of 60 steps" in text and max(map(len, text.splitlines())) <= 80


def test_the_summary_in_a_pipe_is_neither_broken_nor_padded(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        print_summary(make_run(tmp_path / "plays"), Console(width=80, file=out))
    title, *lines = (tmp_path / "out").read_text().splitlines()
    assert title == "plays: finished. Step 60 of 60, 3 MoE layers of 8 experts, balance.law sign"
    assert lines[0].startswith("Held-out bits per byte ") and lines[0].endswith("nats/token")
    assert max(map(len, lines)) > 80 and [line for line in lines if line != line.rstrip()] == []


def test_averaging_keeps_gaps_and_the_last_short_bin() -> None:
    x, y = average(np.arange(1, 6), np.array([1.0, np.nan, np.nan, np.nan, 8.0]), max_points=3)
    np.testing.assert_equal((x, y), ([1.5, 3.5, 5.0], [1.0, np.nan, 8.0]))


def test_quantities_read_as_people_write_them() -> None:
    assert [short(value) for value in (0, 0.5, 7.8812, 999.7, 8123, 2.5e6, 1e9)] == [
        "0", "0.500", "7.88", "1.00k", "8.12k", "2.50M", "1.00G",
    ]  # fmt: skip
    assert [three_digits(value) for value in (0.0132, 0.00001, 1234.5, float("nan"))] == [
        "0.0132",
        "0.0000",
        "1234",
        "n/a",
    ]
    assert [duration(value) for value in (0, 83, 3723, float("inf"))] == ["0:00", "1:23", "1:02:03", "-:--"]
    assert [percent(value) for value in (0.2071, 0.0023, float("nan"))] == ["20.7 %", "0.23 %", "n/a"]
    assert [milliseconds(value) for value in (0.00061, 0.258, 1.52)] == ["0.610 ms", "258 ms", "1.52 s"]


def test_a_full_disk_costs_the_report_and_says_how_to_get_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("the one before")
    with disk_that_takes(500):
        line = report_line(run)
    assert "File too large" in line
    assert line.endswith(f"free some space, then: trimtab report {run}")
    assert (run / "report.html").read_text() == "the one before"
    assert not (run / "report.tmp").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.yaml", lambda _: "- a\n- list\n"),
        ("config.yaml", lambda _: "run: !!python/object:os.system {}\n"),
        ("config.yaml", lambda _: "run: &run\n  run: *run\n"),
        ("config.yaml", lambda _: "run: [1,\n"),
        ("events.jsonl", lambda text: text + '{"event": "started"}\n'),
        ("events.jsonl", lambda text: text + '{"event": "started", "time": 1e300}\n'),
        ("events.jsonl", lambda text: text + '{"event": "recovered", "time": 1, "step": 3}\n'),
        ("metrics.jsonl", lambda text: text + '{"step": 61}\n'),
        ("metrics.jsonl", lambda text: re.sub(r'"loss": [\d.]+', '"loss": true', text)),
        ("metrics.jsonl", lambda text: re.sub(r'"tokens_routed": \d+', '"tokens_routed": 1e30', text)),
    ],
)
def test_a_damaged_run_folder_ends_in_one_line_that_names_the_file(tmp_path: Path, file: str, change) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=3))
    (run / file).write_text(change((run / file).read_text()))
    with pytest.raises(InvalidValue, match=rf"{file}.* damaged") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_a_layer_is_called_as_the_run_calls_it_and_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=3))
    layout = run / "load/layout.json"
    layout.write_text(layout.read_text().replace("layers.1.moe", r"$\\frac{1$"))
    append_event(run, "started", rank_map=[{"rank": 0}])  # an event that no run of ours writes
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("report.tmp", "report.html"):
        (run / name).symlink_to(victim)
    page = write_report(run)
    assert victim.read_text() == "mine" and not page.is_symlink()
    assert Page(page).held["facts"]["layers"][0] == r"$\frac{1$"
    assert "rank_map&quot;: [{&quot;rank&quot;: 0}]" in page.read_text()


def test_missing_steps_stand_beside_the_lost_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=8))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] not in (3, 4, 6)))
    lost = figures(run)["Tokens lost"]
    assert lost.value == "0" and lost.verdict is False
    assert lost.note.endswith("on the 5 recorded steps; the record lacks 3 steps: 3 to 4, 6")


def test_of_many_events_the_first_and_the_last_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(steps=3))
    monkeypatch.setattr(report_page, "MAX_EVENTS", 10)
    monkeypatch.setattr(report_page, "NUM_FIRST_EVENTS", 2)
    for number in range(30):
        append_event(run, "warning", said=f"number {number}.", trace=f"trace {number}." if number in (27, 29) else "")
    before = len((run / "events.jsonl").read_text().splitlines()) - 30
    shown = Page(write_report(run)).shown
    assert "number 22." in shown and "number 21." not in shown and "started" in shown and "trace 27." in shown
    assert f"{before + 20} events more" in shown
