import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from runtime.watch.load_codes import codes_of
from runtime.watch.load_file import RECORDS_A_COLUMN, LoadFile
from tests.synthetic_run import SyntheticRun, make_run
from workers.record.run_log import read_load_history


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("load") / "run", SyntheticRun(steps=100, total_steps=100))


@pytest.mark.parametrize(("first", "last", "num"), [(1, 100, 256), (1, 100, 25), (40, 59, 5), (0, 10**6, 30)])
def test_a_heat_map_has_the_loads_of_the_history(run: Path, first: int, last: int, num: int) -> None:
    steps, counts, bias, layout = read_load_history(run)
    found = LoadFile(run).columns(1, first, last, num, with_bias=True)
    assert found is not None
    inside = [number for number, step in enumerate(steps.tolist()) if first <= step <= last]
    edges = [inside.index(steps.tolist().index(step)) for step in found.steps.tolist()] + [len(inside)]
    assert edges[0] == 0
    for column, (start, stop) in enumerate(pairwise(edges)):
        group = inside[start:stop]
        assert len(group) <= RECORDS_A_COLUMN  # here all of them are read
        expected = sum(counts[number][layout.slices[1]] for number in group)
        assert found.counts[column].tolist() == expected.tolist()
        assert found.bias[column].tolist() == bias[group[0]][layout.slices[1]].tolist()
    assert found.num_records == found.num_read == len(inside)


def test_a_column_of_many_steps_sums_some_of_them_and_says_so(run: Path) -> None:
    _, counts, _, layout = read_load_history(run)
    found = LoadFile(run).columns(0, 1, 100, 2)
    assert found is not None
    assert (found.num_records, found.num_read) == (100, 2 * RECORDS_A_COLUMN)
    assert found.counts[1].tolist() == counts[[50, 62, 75, 87], layout.slices[0]].sum(0).tolist()


def test_the_last_load_is_that_of_the_last_records_with_a_torn_one_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "load").mkdir()
    for name in ("layout.json", "history.bin"):
        raw = (run / "load" / name).read_bytes()
        (tmp_path / "load" / name).write_bytes(raw[:-7] if name == "history.bin" else raw)
    _, counts, bias, _ = read_load_history(run)
    found = LoadFile(tmp_path).last()
    assert found is not None
    assert (found.first, found.last, found.num) == (90, 99, 10)
    assert found.counts_N.tolist() == counts[89:99].sum(0).tolist()
    assert found.bias_N.tolist() == bias[98].tolist()


def test_codes_tell_no_load_from_little(run: Path) -> None:
    codes = codes_of(np.array([0.0, 0.01, 0.25, 1.0, 4.0, 99.0]))
    assert codes.tolist() == [0, 1, 1, 128, 255, 255]


@pytest.mark.parametrize(
    "layout",
    ["{", "[]", '{"names": ["a"], "num_experts": [-1], "balanced": [true]}', '{"names": 3}', "[" * 10_000,
     '{"names": ["a"], "num_experts": [99999999999], "balanced": [true]}',
     '{"names": ["a"], "num_experts": [2, 2], "balanced": [true]}'],
)  # fmt: skip
def test_a_damaged_layout_is_none(tmp_path: Path, layout: str) -> None:
    (tmp_path / "load").mkdir()
    (tmp_path / "load" / "layout.json").write_text(layout)
    (tmp_path / "load" / "history.bin").write_bytes(b"\0" * 1000)
    assert LoadFile(tmp_path).last() is None
    assert LoadFile(tmp_path).columns(0, 0, 10, 10) is None


def test_what_is_not_there_is_none(tmp_path: Path, run: Path) -> None:
    assert LoadFile(tmp_path).last() is None
    assert LoadFile(run).columns(3, 0, 100, 10) is None
    assert LoadFile(run).columns(0, 101, 200, 10) is None
    (tmp_path / "load").mkdir()
    layout = {"names": [], "num_experts": [], "balanced": []}
    (tmp_path / "load" / "layout.json").write_text(json.dumps(layout))
    (tmp_path / "load" / "history.bin").write_bytes(b"\0" * 80)
    assert LoadFile(tmp_path).last() is None  # a dense model
