"""Gives a synthetic run what the view of its text shows: sources, settings of the data, and samples."""

import json
import random
from pathlib import Path
from typing import Any

from tests.synthetic_run import SyntheticRun, make_run

LAYERS = SyntheticRun().layout.names
SOURCES = [
    {"name": "plays", "root": "/texts/plays", "num_files": 3, "num_train_tokens": 90_000, "num_val_tokens": 5_000},
    {"name": "python", "root": "/texts/python", "num_files": 40, "num_train_tokens": 30_000, "num_val_tokens": 1_500},
]
TEXTS = (
    ("ROMEO:", " I will not look upon the day,\nnor on the night that\u00e9"),
    ("", "def main(arguments):\n    return"),
)


def make_text_run(path: Path) -> Path:
    """The synthetic run with its text."""
    return add_text(make_run(path))


def add_text(path: Path) -> Path:
    """Give a synthetic run its text, and samples of four steps."""
    config = (path / "config.yaml").read_text().replace("hidden: 192", "hidden: 192\n  max_seq_len: 100")
    config = config.replace("data: {", "data: {mix: [3, 1], mix_after: [1, 1], shift_at: 41, pack_documents: true, ")
    (path / "config.yaml").write_text(config)
    (path / "data.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "sources": SOURCES}))
    lines = [sample(step, number) for step in (0, 20, 40, 60) for number in range(len(TEXTS))]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sample(step: int, number: int) -> dict[str, Any]:
    """A line of samples.jsonl: a token for each character, the first of none, and 8 experts of which 2 take each."""
    given, new = TEXTS[number]
    draw = random.Random(step * 10 + number)
    tokens = ["", *given, *f"{new} {step}"]
    rows = {name: [[*draw.sample(range(8), 2)] for _ in tokens] for name in LAYERS}
    experts = {name: [*each[:-1], None] for name, each in rows.items()}
    return {"step": step, "time": 1.7e9 + step, "sample": number, "prompt": given, "tokens": tokens,
            "num_prompt_tokens": len(given) + 1, "experts": experts}  # fmt: skip
