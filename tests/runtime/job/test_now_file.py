import json
import time
from pathlib import Path

from dispatch.diagnosis.activity import Activity, Collective
from runtime.job import now_file
from runtime.job.now_file import NowFile

WAIT = Collective(
    op="all_to_all", group="ep", index=3, members=(0, 1), step=7, layer="layers.1.moe", phase="combine", waited_s=2.0,
    splits=None,
)  # fmt: skip
COMPUTES = Activity(
    step=7, layer="layers.1.moe", phase="experts", phase_s=0.25, waits_in=None, started={}, recent={}, memory_bytes=99
)
WAITS = Activity(step=7, layer="layers.1.moe", phase="combine", phase_s=2.5, waits_in=WAIT, started={}, recent={})


def test_each_rank_has_its_place_and_how_long_it_has_waited_by_now(tmp_path: Path) -> None:
    before = time.time()
    NowFile(tmp_path).write({1: (WAITS, 0.5), 0: (COMPUTES, 0.0)})
    now = json.loads((tmp_path / "now.json").read_text())
    assert before <= now["time"] <= time.time()
    first, second = now["ranks"]
    assert first == {
        "rank": 0, "step": 7, "phase": "experts", "layer": "layers.1.moe", "for_s": 0.25, "waits_in": None,
        "waits_s": None, "memory_bytes": 99, "age_s": 0.0,
    }  # fmt: skip
    assert (second["rank"], second["for_s"], second["waits_s"], second["waits_in"]) == (1, 3.0, 2.5, str(WAIT))


def test_it_is_written_seldom_and_never_raises(tmp_path: Path, monkeypatch) -> None:
    file = NowFile(tmp_path)
    file.write({})
    assert not (tmp_path / "now.json").exists()  # nobody has answered yet
    file.write({0: (COMPUTES, 0.0)})
    file.write({0: (WAITS, 0.0)})
    assert json.loads((tmp_path / "now.json").read_text())["ranks"][0]["phase"] == "experts"
    monkeypatch.setattr(now_file, "EVERY_S", 0.0)
    file.write({0: (WAITS, 0.0)})
    assert json.loads((tmp_path / "now.json").read_text())["ranks"][0]["phase"] == "combine"
    NowFile(tmp_path / "gone").write({0: (COMPUTES, 0.0)})
