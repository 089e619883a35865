"""`python -m tests.runtime.watch.pictures FOLDER OUT RUN ...`: the pictures of docs/watch.md, of runs in FOLDER."""

import sys
from pathlib import Path

from tests.runtime.watch.browser import browser, opened, served

PICTURES = (
    ("overview", 1400, "light"),
    ("overview", 400, "dark"),
    ("overview", 400, "light"),
    ("balance", 1400, "dark"),
    ("balance", 1400, "light"),
    ("compare", 1400, "dark"),
)


def main(folder: str, out: str, *runs: str) -> None:
    with served(Path(folder), *runs) as url, browser() as chromium:
        for view, width, scheme in PICTURES:
            with opened(chromium, url, width=width, scheme=scheme) as watched:
                watched.show(view)
                height = 1150 if width > 1000 else 1400
                watched.page.set_viewport_size({"width": width, "height": height})
                watched.page.wait_for_timeout(1200)
                watched.page.screenshot(path=Path(out) / f"watch-{view}-{width}-{scheme}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
