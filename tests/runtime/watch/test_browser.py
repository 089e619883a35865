"""The page in a real browser: a run that begins, loses a worker, comes back and ends while somebody looks."""

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from runtime.runs.event_text import event_text
from tests.runtime.job.test_job import _arguments
from tests.runtime.watch.browser import (
    NEEDS_CHROMIUM,
    TRIMTAB,
    VIEWS,
    Watched,
    browser,
    drag_over_second_quarter,
    opened,
    served,
)
from tests.runtime.watch.text_run import LAYERS, add_text, make_text_run, sample
from tests.synthetic_run import SyntheticRun, add_metric, make_run
from workers.record.run_log import append_event, read_events, read_metrics

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
SAMPLES = ('--run.sample_prompts=["12 green", "x, y"]', "--run.sample_tokens=8")
WAIT_S = 120.0
START_S = 240.0  # of a run, on a machine that does other things too
OWN_METRIC = "a_metric_that_the_user_added_with_the_longest_name_that_is_drawn"[:63]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as launched:
        yield launched


@contextmanager
def training(folder: Path, *more: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    command = [str(TRIMTAB), "train", *_arguments(folder, *more)]
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)


def label_of(page: Page, title: str) -> str:
    return page.get_attribute(f'figure[data-chart="{title}"] .plot', "aria-label") or ""


def steps_drawn(page: Page) -> tuple[int, int]:
    """The first and the last step of the chart of the loss."""
    found = re.search(r"steps (\d+) to (\d+)\.", label_of(page, "Loss"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def wait_for(page: Page, condition: Callable[[], object]) -> None:
    """Until a condition holds that only Python can tell; as long as Playwright waits for one of the page's."""
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up
        page.wait_for_timeout(100)


def serious_faults(watched: Watched) -> list[str]:
    found = Axe().run(watched.page).response["violations"]
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found if each["impact"] in ("serious", "critical")
    ]


def test_the_page_shows_a_run_begin_lose_a_worker_come_back_and_end(chromium: Browser, tmp_path: Path) -> None:
    faults = [{"rank": 1, "step": 40, "phase": "experts", "action": "kill"}]
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    how = ("--name=live", "--steps=120", "--run.checkpoint_every=20", "--run.eval_every=20", *SAMPLES)
    with served(tmp_path, "live", "--wait") as url, opened(chromium, url) as watched:
        page = watched.page
        assert page.url.endswith("/")  # the token is out of the address
        watched.wait_for_state("not begun", 10)
        with training(tmp_path, *how, TRIMTAB_FAULTS=str(tmp_path / "faults.json")) as process:
            watched.wait_for_state("running", START_S)
            page.wait_for_selector('figure[data-chart="Loss"] canvas')
            before = steps_drawn(page)
            page.wait_for_function(
                "text => document.querySelector('figure[data-chart=Loss] .plot').ariaLabel !== text",
                arg=label_of(page, "Loss"),
            )
            assert steps_drawn(page)[1] >= before[1]
            watched.show("cluster")
            wait_for(page, lambda: len(re.findall(r"in step \d+\s.*\s[\d.]+ [MG]iB", page.inner_text("main"))) == 2)
            watched.show("overview")
            watched.wait_for_state("finished", START_S)
            # Between the failure and the recovery it may be seen as failed, for the moment that it is.
            seen = [state for state in watched.states_seen() if state != "failed"]
            assert seen[-4:] == ["running", "recovering", "running", "finished"]
            assert process.wait(60) == 0
        page.wait_for_function("document.querySelector('#when').textContent.includes('step 120 of 120')")
        wait_for(page, lambda: steps_drawn(page)[1] == 120)
        watched.show("cluster")
        recovered = next(event for event in read_events(tmp_path / "runs" / "live") if event["event"] == "recovered")
        wait_for(page, lambda: event_text(recovered) in page.inner_text("main"))
        wait_for(page, lambda: "1 recovery" in page.inner_text("main"))
        for view in VIEWS:
            watched.show(view)
        watched.show("text")
        wait_for(page, lambda: "2 texts after step 120" in page.inner_text("main"))
        tokens = page.locator(".sample").nth(1).locator("[role=option]").all_inner_texts()
        assert "".join(tokens[:4]) == "x, y"
        steps = page.get_by_label("After step").locator("option").all_inner_texts()
        assert steps == ["the newest", *map(str, range(120, -20, -20))]
        assert watched.complaints == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    made = add_text(make_run(folder / "runs" / "one", SyntheticRun(steps=200, total_steps=200)))
    add_metric(made, OWN_METRIC, 2.5)
    make_text_run(folder / "runs" / "texts")
    append_event(made, "failed", reason="a rank was lost", diagnosis="a stack\n" * 50)
    make_run(folder / "runs" / "two", SyntheticRun(steps=90, total_steps=200, law="none", seed=1))
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1400, 2500])
def test_no_view_has_a_serious_fault_for_those_who_do_not_see_or_use_no_mouse(
    chromium: Browser, folder: Path, width: int, scheme: str
) -> None:
    with served(folder, "one", "two") as url, opened(chromium, url, width=width, scheme=scheme) as watched:
        for view in VIEWS:
            watched.show(view)
            assert serious_faults(watched) == []
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.complaints == []


def test_a_window_is_chosen_by_the_pointer_and_by_the_keyboard(chromium: Browser, folder: Path) -> None:
    with served(folder, "one") as url, opened(chromium, url) as watched:
        page = watched.page
        page.wait_for_selector('figure[data-chart="Loss"] .u-over')
        drag_over_second_quarter(page, "Loss")
        page.wait_for_function("!document.querySelector('#window .range').textContent.includes('0 to 200')")
        wait_for(page, lambda: steps_drawn(page) == (pytest.approx(50, abs=8), pytest.approx(100, abs=8)))
        page.focus("text=Last 100")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#window .range').textContent === 'steps 101 to 200'")
        # A chart for the metric that the user has added, after those that every run has.
        wait_for(page, lambda: label_of(page, OWN_METRIC).startswith(f"{OWN_METRIC}, steps 101 to 200. "))
        assert f"{OWN_METRIC}: 2.50 at the end" in label_of(page, OWN_METRIC)
        titles = page.locator("figure[data-chart] h3").all_inner_texts()
        assert (titles[0], titles[-2:], len(titles)) == ("Loss", ["MFU", OWN_METRIC], 9)
        page.focus('button[aria-label="Show all steps"]')
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#window .range').textContent === 'steps 0 to 200'")
        assert watched.complaints == []


def test_the_figures_of_a_run_stand_beside_those_of_another_at_the_same_steps(chromium: Browser, folder: Path) -> None:
    with served(folder, "two", "one") as url, opened(chromium, url) as watched:
        page = watched.page
        page.wait_for_selector('figure[data-chart="Loss"] canvas')
        page.get_by_label("Figures against").select_option("one")
        mean = [
            statistics.fmean(line["loss"] for line in read_metrics(folder / "runs" / name)[0][26:90])
            for name in ("two", "one")
        ]
        percent = f"{abs(mean[0] / mean[1] - 1) * 100:.1f}"
        wait_for(page, lambda: "one: " in page.inner_text(".glance"))
        text = page.inner_text(".glance")
        found = re.search(r"one: ([\d.]+) \(here [+−]([\d.]+)\s?%\)", text)
        assert found and float(found[1]) == pytest.approx(mean[1], rel=0.01)
        assert float(found[2]) == pytest.approx(float(percent), abs=0.6)
        assert "one: " in page.inner_text('section[aria-label="Figures"]')
        assert page.locator("figure[data-chart]").count() == 8  # no metric of the user's own
        assert serious_faults(watched) == [] and watched.complaints == []


def test_an_expert_is_chosen_on_the_heat_map(chromium: Browser, folder: Path) -> None:
    with served(folder, "one") as url, opened(chromium, url) as watched:
        watched.show("balance")
        canvas = watched.page.locator('figure[data-chart="Load of each expert through time"] canvas')
        box = canvas.bounding_box()
        assert box is not None
        caption = 'figure[data-chart="Load of each expert through time"] figcaption'

        def is_told() -> object:
            canvas.hover(position={"x": 100, "y": box["height"] * 5.5 / 8})
            told = watched.page.inner_text(caption)
            return re.match(r"layers.1.moe, expert 5, step \d+: [\d.]+ × the mean load", told)

        wait_for(watched.page, is_told)
        canvas.click(position={"x": 100, "y": box["height"] * 5.5 / 8})
        assert watched.page.input_value('input[type="number"]') == "5"


def test_tokens_are_told_by_pointer_and_keyboard_at_the_chosen_step_and_layer(chromium: Browser, folder: Path) -> None:
    with served(folder, "texts", "two") as url, opened(chromium, url) as watched:
        page = watched.page
        watched.show("text")
        page.get_by_label("After step").select_option("40")
        page.get_by_label("Experts of layer").select_option(LAYERS[2])
        line = sample(40, 1)
        told = [f"experts {', '.join(map(str, ids))}" for ids in line["experts"][LAYERS[2]] if ids]
        box = page.locator(".sample").nth(1)
        wait_for(
            page, lambda: "after step 40" in page.inner_text("main") and f"in {LAYERS[2]}" in page.inner_text("main")
        )
        assert box.locator("[role=option]").count() == len(line["tokens"])
        assert box.locator(".tokens").inner_text() == "·" + "".join(line["tokens"]).replace("\n", "↵\n")
        box.locator("[role=option]").nth(3).hover()
        assert box.locator(".told").inner_text() == f"“{line['tokens'][3]}”: {told[3]}"
        box.locator("[role=option]").first.focus()
        for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
            page.keyboard.press(key)
            assert box.locator(".told").inner_text() == f"“{line['tokens'][at]}”: {told[at]}"
            assert box.locator('[aria-selected="true"]').count() == 1
        page.keyboard.press("End")
        assert box.locator(".told").inner_text().endswith("not read by the model")
        expert = line["experts"][LAYERS[2]][0][0]
        takes = sum(expert in ids for ids in line["experts"][LAYERS[2]] if ids)
        box.locator(".chips button").get_by_text(f"{expert} · {takes}").click()
        assert box.locator(".marked").count() == takes
        assert serious_faults(watched) == [] and watched.complaints == []
        page.locator("#run").select_option("two")
        wait_for(page, lambda: "run.sample_prompts" in page.inner_text("main"))


def test_the_view_of_the_text_says_what_went_in(chromium: Browser, folder: Path) -> None:
    with served(folder, "texts") as url, opened(chromium, url) as watched:
        watched.show("text")
        text = watched.page.inner_text("main")
        assert "1,600\n" in text and "16 sequences of 100" in text  # tokens of a batch
        assert "96.0k" in text and "0.800 times the text" in text  # of 60 steps, of 120,000 tokens
        assert "whole documents" in text
        row = watched.page.locator("main tr", has_text="plays").inner_text().split()
        # 40 steps by 3 to 1 and 20 by 1 to 1: 48,000 and 16,000 tokens
        assert row[:8] == ["plays", "3", "90,000", "5,000", "50.0", "%", "64.0k", "0.711"]


def test_hostile_names_events_and_settings_stay_text(chromium: Browser, tmp_path: Path) -> None:
    path = make_run(tmp_path / HOSTILE.replace("/", "∕"))
    (path / "config.yaml").write_text(f"run: {{'{HOSTILE}': 1}}\n")
    layout = json.loads((path / "load" / "layout.json").read_text()) | {"names": [HOSTILE] * 3}
    (path / "load" / "layout.json").write_text(json.dumps(layout))
    (path / "data.json").write_text(json.dumps({"tokenizer": HOSTILE, "sources": [{"name": HOSTILE}]}))
    odd = {"step": 1, "sample": 0, "prompt": HOSTILE, "tokens": [HOSTILE], "experts": {HOSTILE: [[1]]}}
    (path / "samples.jsonl").write_text(json.dumps(odd) + "\n")
    append_event(path, "started", rank_map=[{"rank": HOSTILE, "node": HOSTILE}], exchange={"reason": HOSTILE})
    append_event(path, HOSTILE, reason=HOSTILE, diagnosis=HOSTILE)
    append_event(path, "failed", reason=HOSTILE, diagnosis=HOSTILE)
    make_run(tmp_path / "other")
    with served(tmp_path, str(path), "./other") as url, opened(chromium, url) as watched:
        for view in VIEWS:
            watched.show(view)
            wait_for(watched.page, lambda: "<img src=x" in watched.page.inner_text("body"))
            assert watched.page.locator("img, script:not([src])").count() == 0
        assert watched.complaints == []
