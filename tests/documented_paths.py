"""The files that docs/architecture.md names as the way of something through the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def documented_path(of: str) -> list[str]:
    """The files in the row of `of`, each once; a bare name is in the folder of the one before."""
    [row] = [line for line in (ROOT / "docs/architecture.md").read_text().splitlines() if line.startswith(f"| {of} |")]
    files: list[str] = []
    for name in re.findall(r"`([\w/]+\.py)`", row):
        files.append(name if "/" in name else str(Path(files[-1]).parent / name))
    return list(dict.fromkeys(files))
