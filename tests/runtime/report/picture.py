"""`python -m tests.runtime.report.picture RUN OUT`: docs/images/run.png, of the report of a default run."""

import io
import sys
from pathlib import Path

from PIL import Image

from runtime.report.report import write_report
from tests.runtime.watch.browser import browser, opened
from tests.runtime.watch.pictures import save

WIDTH, MARGIN = 1240, 12


def main(run: str, out: str) -> None:
    """The top of the page, down to the second row of charts, and the load of a layer below it."""
    with browser() as chromium, opened(chromium, write_report(run).as_uri(), width=WIDTH) as watched:
        watched.page.wait_for_timeout(1500)
        whole = Image.open(io.BytesIO(watched.page.screenshot(full_page=True)))

        def edges(title: str) -> tuple[int, int]:
            box = watched.page.locator(f'figure[data-chart="{title}"]').bounding_box()
            assert box is not None
            return int(box["y"]), int(box["y"] + box["height"])

        parts = [(0, edges("Gradient norm")[1] + MARGIN), edges("Load of each expert through time")]
        parts[1] = (parts[1][0], parts[1][1] + MARGIN)
    shot = Image.new("RGB", (WIDTH, sum(end - start for start, end in parts)))
    place = 0
    for start, end in parts:
        shot.paste(whole.crop((0, start, WIDTH, end)), (0, place))
        place += end - start
    save(shot, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
