"""Holes that chaos makes in a record are holes, are undone, and a start that was refused may not touch a thing."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from runtime.commands.chaos.damage import DAMAGES, Damage, damaged_line, missing_line, missing_record
from runtime.commands.chaos.kinds import KINDS
from runtime.commands.chaos.plan import ChaosFault
from runtime.commands.chaos.record import read_record
from runtime.commands.chaos.target import TargetRun, Unfulfilled
from tests.runtime.commands.chaos.test_sameness import write

FAULT = ChaosFault(number=0, kind=KINDS["hole in the record"], step=15, rank=0, machine=0)  # the hole is at step 3


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("damage", "hole"),
    [(damaged_line, "metrics.jsonl, line 5 is damaged"), (missing_line, "lines"), (missing_record, "loads")],
)
def test_a_hole_is_made_and_undone(tmp_path: Path, damage: Damage, hole: str) -> None:
    run = cast(TargetRun, SimpleNamespace(run_dir=write(tmp_path / "run")))
    before = files(tmp_path)
    with damage(run, FAULT) as promise:
        assert r"\b3\b" in promise
        record = read_record(run.run_dir)
        steps = {
            "lines": [line["step"] for line in record.lines if line["kind"] == "train"],
            "loads": [step for step, _ in record.loads],
        }
        assert steps.get(hole, [1, 2, 4, 5, 6]) == [1, 2, 4, 5, 6]
        assert record.damage == ([hole] if "damaged" in hole else [])
    assert files(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES["hole_in_record"])
def test_a_refused_start_that_moves_lines_aside_has_not_kept_its_promise(tmp_path: Path, damage: Damage) -> None:
    run = cast(TargetRun, SimpleNamespace(run_dir=write(tmp_path / "run")))
    folder = run.run_dir / ("load" if damage is missing_record else "")
    with pytest.raises(Unfulfilled, match=r"refused has changed .*new"), damage(run, FAULT):
        (folder / "new").write_bytes(b"lines that were moved aside")
