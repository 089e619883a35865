"""report.html in a real browser, from a disk: no server, no network."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from runtime.report.report import write_report
from tests.runtime.watch.browser import NEEDS_CHROMIUM, browser, drag_over_second_quarter, opened
from tests.runtime.watch.test_browser import HOSTILE, label_of, serious_faults
from tests.synthetic_run import SyntheticRun, add_metric, make_run
from workers.record.run_log import append_event, read_load_history, read_metrics

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]
MAP = 'figure[data-chart="Load of each expert through time"]'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "plays", SyntheticRun(steps=200, total_steps=200))
    append_event(run, "failed", reason="a rank was lost", diagnosis="a stack\n" * 50)
    add_metric(run, "of_the_user", 2.5)
    return write_report(run)


@pytest.fixture
def page(chromium: Browser, report: Path) -> Iterator[Page]:
    with opened(chromium, report.as_uri()) as watched:
        watched.page.wait_for_selector('figure[data-chart="Loss"] canvas')
        yield watched.page
        assert watched.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_report_has_no_serious_fault_and_no_complaint(
    chromium: Browser, report: Path, width: int, scheme: str
) -> None:
    with opened(chromium, report.as_uri(), width=width, scheme=scheme) as watched:
        watched.page.wait_for_selector('figure[data-chart="Loss"] canvas')
        watched.page.wait_for_timeout(500)
        assert serious_faults(watched) == []
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.page.locator("figure .uplot").count() >= 15
        assert "of_the_user: 2.50 at the end" in label_of(watched.page, "of_the_user")
        assert watched.complaints == []


def test_the_pointer_is_told_the_value_of_a_step(page: Page, report: Path) -> None:
    page.select_option("label:has-text('Smoothing') select", label="none")
    chart = page.locator('figure[data-chart="Gradient norm"]')
    chart.locator(".u-over").hover(position={"x": 100, "y": 40})
    told = re.fullmatch(r"step (\d+) · norm ([\d.]+)", chart.locator("figcaption").inner_text())
    assert told
    line = read_metrics(report.parent)[0][int(told[1]) - 1]
    assert float(told[2]) == pytest.approx(line["grad_norm"], rel=5e-3)


def test_another_layer_is_drawn_when_it_is_chosen(page: Page, report: Path) -> None:
    history = read_load_history(report.parent)
    for layer in (0, 2):
        page.select_option("label:has-text('Layer') select", label=f"layers.{layer + 1}.moe")
        page.wait_for_function(
            "([css, name]) => document.querySelector(css).ariaLabel.includes(name)",
            arg=[f"{MAP} canvas", f"layers.{layer + 1}.moe"],
        )
        canvas = page.locator(f"{MAP} canvas")
        box = canvas.bounding_box()
        assert box is not None
        canvas.hover(position={"x": 3, "y": box["height"] * 5.5 / 8})
        told = re.match(r"layers\.\d\.moe, expert 5, step 1: ([\d.]+) ×", page.inner_text(f"{MAP} figcaption"))
        counts = history.counts[0, layer * 8 : layer * 8 + 8]
        assert told and float(told[1]) == pytest.approx(counts[5] / counts.mean(), rel=0.012, abs=0.01)
        canvas.click(position={"x": 3, "y": box["height"] * 5.5 / 8})
        bias = history.bias[:, layer * 8 + 5]
        label = label_of(page, "Bias of the chosen expert")
        last = re.search(r"bias: (-?[\d.]+) at the end", label)
        assert last and float(last[1]) == pytest.approx(bias[-1], rel=5e-3, abs=1e-3)


def test_a_window_of_steps_is_that_of_all_charts(page: Page) -> None:
    page.click("text=Last 100")
    for title in (
        "Loss",
        "Where the time of a step went",
        "Bias range",
        "Spread of the bias",
        "MaxVio of the chosen layer",
    ):
        assert "steps 101 to 200" in label_of(page, title), title
    assert "steps 101 to 200" in (page.get_attribute(f"{MAP} canvas", "aria-label") or "")
    drag_over_second_quarter(page, "Loss")
    found = re.fullmatch(r"steps (\d+) to (\d+)", page.inner_text("#window .range"))
    assert found and [int(each) for each in found.groups()] == [pytest.approx(125, abs=4), pytest.approx(150, abs=4)]


def test_evaluations_are_not_smoothed(page: Page, report: Path) -> None:
    last = read_metrics(report.parent)[1][-1]
    page.select_option("label:has-text('Smoothing') select", label="strong")
    page.wait_for_timeout(300)
    found = re.search(r"held out: ([\d.]+) at the end", label_of(page, "Loss"))
    assert found and float(found[1]) == pytest.approx(last["val_loss"], rel=5e-3)


def test_no_line_joins_the_untrained_model_and_the_next_evaluation(page: Page) -> None:
    chart = page.locator('figure[data-chart="Held-out bits per byte"] canvas')
    coloured = """canvas => {
      const { width, height } = canvas, drawn = canvas.getContext("2d").getImageData(0, 0, width, height).data;
      const isLine = (x) => [...Array(height).keys()].some((y) => {
        const [r, g, b, a] = drawn.slice((y * width + x) * 4, (y * width + x) * 4 + 4);
        return a > 200 && r > 150 && g < 140 && b < 60;
      });
      return [...Array(width).keys()].filter(isLine);
    }"""
    columns = chart.evaluate(coloured)
    gaps = [after - before for before, after in itertools.pairwise(columns) if after - before > 1]
    assert len(gaps) == 1 and gaps[0] > 20  # evaluations every 20 of 200 steps


def test_without_scripts_the_figures_are_there(chromium: Browser, report: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    shown = page.inner_text("body")
    for each in ("The charts need JavaScript", "Tokens lost", "200 of 200 steps", "everything else", "a rank was lost"):
        assert each in shown, each
    context.close()


def test_what_a_run_calls_things_stays_text(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / HOSTILE.replace("/", "∕"))
    layout = json.loads((run / "load" / "layout.json").read_text()) | {"names": [HOSTILE] * 3}
    (run / "load" / "layout.json").write_text(json.dumps(layout))
    (run / "config.yaml").write_text(f"run: {{'{HOSTILE}': 1}}\n")
    metrics = (run / "metrics.jsonl").read_text().replace('"plays"', json.dumps(HOSTILE))
    (run / "metrics.jsonl").write_text(metrics)
    append_event(run, "failed", reason=HOSTILE, diagnosis=HOSTILE)
    with opened(chromium, write_report(run).as_uri()) as watched:
        page = watched.page
        page.wait_for_selector(f"{MAP} canvas")
        assert page.inner_text("h1").startswith("<img src=x") and "<img src=x" in page.inner_text("select >> nth=1")
        assert "<img src=x" in page.inner_text('figure[data-chart="Held-out bits per byte by source"]')
        assert page.locator("img").count() == 0 and page.locator("script").count() == 3
        assert watched.complaints == []
