"""`python -m tests.runtime.watch.pictures FOLDER OUT RUN ...`: the pictures of docs/watch.md, of runs in FOLDER."""

import io
import sys
from pathlib import Path

from PIL import Image

from tests.runtime.watch.browser import browser, opened, served

PICTURES = (
    ("overview", 1400, "light"),
    ("overview", 1400, "dark"),
    ("overview", 400, "light"),
    ("overview", 400, "dark"),
    ("balance", 1400, "dark"),
    ("text", 1400, "light"),
    ("compare", 1400, "light"),
)
NUM_COLOURS = 256  # of a picture


def main(folder: str, out: str, *runs: str) -> None:
    """Make all of them."""
    with served(Path(folder), *runs) as url, browser() as chromium:
        for view, width, scheme in PICTURES:
            height = 1150 if width > 1000 else 1400
            with opened(chromium, url, width=width, height=height, scheme=scheme) as watched:
                watched.show(view)
                shot = Image.open(io.BytesIO(watched.page.screenshot()))
            save(shot, Path(out) / f"watch-{view}-{width}-{scheme}.png")


def save(shot: Image.Image, target: Path) -> None:
    """With few colours: fewer bytes, and no difference to be seen."""
    few = shot.convert("RGB").quantize(NUM_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
