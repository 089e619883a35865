"""A real browser in front of a real server: Debian's chromium, driven by Playwright, which brings no browser here."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

TRIMTAB = Path(sys.executable).with_name("trimtab")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
VIEWS = ("overview", "balance", "cluster", "text", "compare")
_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
_NOTE_STATES = """() => {
  const word = document.querySelector("#state .word");
  window.statesSeen = [];
  new MutationObserver(() => window.statesSeen.push(word.textContent)).observe(word, { childList: true });
}"""


@dataclass
class Watched:
    """A page that is open. complaints: what its console has shown that should not be there."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def show(self, view: str) -> None:
        """Go to a view and wait until it is drawn."""
        self.page.click(f'nav a[href="#{view}"]')
        self.page.wait_for_function("document.querySelector('#view').childElementCount > 1")
        self.page.wait_for_timeout(1500)

    def states_seen(self) -> list[str]:
        """The words of the state since the page was opened, in their order."""
        return list(self.page.evaluate("window.statesSeen"))

    def wait_for_state(self, word: str, limit_s: float) -> None:
        self.page.wait_for_function(
            "word => document.querySelector('#state .word').textContent === word", arg=word, timeout=limit_s * 1e3
        )


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    """`trimtab watch` with these arguments; gives the URL that it prints. Ends it with Ctrl-C."""
    command = [str(TRIMTAB), "watch", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS))
        try:
            yield launched
        finally:
            launched.close()


@contextmanager
def opened(
    chromium: Browser, url: str, *, width: int = 1400, height: int = 900, scheme: str = "light"
) -> Iterator[Watched]:
    """The page at this URL, as a person with such a window sees it."""
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(120_000)  # a machine that does other things too
    watched = Watched(context.new_page())
    page, complaints = watched.page, watched.complaints
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    page.goto(url)
    page.evaluate(_NOTE_STATES)
    yield watched
    context.close()


def drag_over_second_quarter(page: Page, title: str) -> None:
    """Choose a window of steps with the pointer, on the chart of this title."""
    box = page.locator(f'figure[data-chart="{title}"] .u-over').bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=5)
    page.mouse.up()
