"""Writing router scores: what they are to 16 bits, and that nothing keeps a run from going on."""

from pathlib import Path

import pytest
import torch

from dispatch.config import RouterConfig
from dispatch.routing.router import Router
from tests.workers.record.test_run_log import disk_that_takes
from workers.record.record_file import list_records, read_record
from workers.record.score_log import SCALE, ScoreLog, ScoreShape, pack_scores, set_aside_later_scores

SHAPE = ScoreShape(names=("a", "b"), num_experts=(4, 4), world_size=1, num_micro_batches=1)


def make_routers() -> dict[str, Router]:
    torch.manual_seed(0)
    return {name: Router(8, RouterConfig(num_experts=4, top_k=2)) for name in SHAPE.names}


def route(routers: dict[str, Router], num_tokens: int = 5) -> None:
    for router in routers.values():
        router(torch.randn(num_tokens, 8))


def records(folder: Path) -> list[tuple[int, int]]:
    return [(place.step, place.tag) for place in list_records(folder / "scores/from_00000001/rank_0.bin")[0]]


def test_scores_are_kept_to_a_65535th() -> None:
    scores_TE = torch.tensor([[0.0, 1.0], [0.5, 0.25], [1 / SCALE, 1e-9]])
    raw = pack_scores(scores_TE)
    assert list(memoryview(raw).cast("H")) == [0, 65535, 32768, 16384, 1, 0]


def test_every_nth_step_is_recorded_with_all_its_layers_and_micro_batches(tmp_path: Path) -> None:
    routers = make_routers()
    with ScoreLog(tmp_path, 1, 0, SHAPE, every=3, on_warning=pytest.fail) as log:
        log.attach(routers)
        route(routers)  # before the first step
        for step in range(1, 6):
            log.begin_step(step)
            route(routers)
            route(routers)
    route(routers)  # after the last one
    assert records(tmp_path) == [(1, 0), (1, 1), (1, 2), (1, 3), (4, 0), (4, 1), (4, 2), (4, 3)]


def test_a_full_disk_costs_whole_steps_and_two_warnings(tmp_path: Path) -> None:
    routers, heard = make_routers(), []
    with ScoreLog(tmp_path, 1, 0, SHAPE, every=1, on_warning=heard.append) as log:
        log.attach(routers)
        with disk_that_takes(1500):
            for step in range(1, 5):
                log.begin_step(step)
                route(routers, 50)
        for step in (5, 6):
            log.begin_step(step)
            route(routers, 50)
    assert len(heard) == 2
    assert "File too large" in heard[0] and "the run goes on" in heard[0]
    assert "again, from step 5" in heard[1]
    # 420 bytes each: the fourth was cut short and completed later; then steps are whole again.
    assert records(tmp_path) == [(1, 0), (1, 1), (2, 0), (2, 1), (5, 0), (5, 1), (6, 0), (6, 1)]
    path = tmp_path / "scores/from_00000001/rank_0.bin"
    assert all(len(read_record(path, place)) == 50 * 4 * 2 for place in list_records(path)[0])


def test_a_folder_that_cannot_be_made_warns_once(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("in the way")
    routers, heard = make_routers(), []
    with ScoreLog(tmp_path, 1, 0, SHAPE, every=1, on_warning=heard.append) as log:
        log.attach(routers)
        log.begin_step(1)
        route(routers)
    assert len(heard) == 1 and "cannot write" in heard[0]


def test_resuming_renames_later_starts_and_deletes_none(tmp_path: Path) -> None:
    def folders() -> list[str]:
        return sorted(path.name for path in (tmp_path / "scores").iterdir())

    set_aside_later_scores(tmp_path, 0)  # nothing was recorded yet
    for first in (1, 51, 81):
        ScoreLog(tmp_path, first, 0, SHAPE, every=1, on_warning=pytest.fail).close()
    set_aside_later_scores(tmp_path, 80)
    assert folders() == ["from_00000001", "from_00000051", "from_00000081.superseded_1"]
    ScoreLog(tmp_path, 81, 0, SHAPE, every=1, on_warning=pytest.fail).close()
    set_aside_later_scores(tmp_path, 80)
    assert folders()[2:] == ["from_00000081.superseded_1", "from_00000081.superseded_2"]
    set_aside_later_scores(tmp_path, 50)
    assert folders()[1] == "from_00000051.superseded_1"
