"""`trimtab bench coordinator`: the model worked by hand, sizes against the wire, one small whole run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cluster.ray.session import RaySession
from runtime.cli import main
from runtime.commands.bench.coordinator.case import ControlCase, counts_of, summed_bytes, update_bytes
from runtime.commands.bench.coordinator.load import drive, measure_load
from runtime.commands.bench.coordinator.model import HopCost, model
from runtime.commands.bench.coordinator.ranks import BenchRank, RankFigures
from runtime.job.coordinator import CoordinatorPolicy
from tests.ranks import run_ranks
from workers.control import loop
from workers.control.wire import VersionedState, decode

SMALL = ControlCase(layers=3, experts=8, law="newton", workers=3, rounds=4)


def test_the_model_of_four_and_five_ranks_is_the_one_worked_by_hand() -> None:
    hop = HopCost(alpha_s=1e-3, beta_s=1e-6)
    four = model(4, hop, alone_s=0.01, summed_bytes=1000, update_bytes=500)
    # tree: 2 hops of 1000 bytes up and 2 down, 2 ms each; ring: 6 of 250, 1.25 ms each. Then 10 ms, and 2 of 500 down.
    assert four.tree_s == pytest.approx(0.008 + 0.010 + 0.003)
    assert four.ring_s == pytest.approx(0.0075 + 0.010 + 0.003)
    assert four.sent_bytes == 0.75 * 2500
    five = model(5, hop, alone_s=0.01, summed_bytes=1000, update_bytes=500)
    assert five.tree_s == pytest.approx(6 * 0.002 + 0.010 + 3 * 0.0015)


def test_hops_are_fitted_by_their_medians() -> None:
    samples = {size: [9.0, 2e-5 + 1e-9 * size, 0.0] for size in (64, 1000, 10**6)}  # two of three are outliers
    fitted = HopCost.fit(samples)
    assert (fitted.alpha_s, fitted.beta_s) == (pytest.approx(2e-5), pytest.approx(1e-9))
    assert HopCost.fit({10: [1e-6], 10**6: [1.0]}).alpha_s == 0.0  # never negative


def test_world_sizes_and_the_smaller_case_of_a_large_report() -> None:
    assert [ControlCase(61, 256, "sign", workers, 1).world_sizes for workers in (1, 2, 6, 8)] == [
        (1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)
    ]  # fmt: skip
    large = ControlCase(61, 256, "sign", 8, 1).with_law("quantile")
    assert large.layers == 8 and 8 * large.make_law().num_counts <= 1 << 24
    assert ControlCase(61, 256, "sign", 8, 1).with_law("newton").layers == 61


def test_the_load_generator_sends_true_reports_of_the_size_it_says() -> None:
    law, reports = SMALL.make_law(), []
    policy = CoordinatorPolicy()

    def coordinator(raw: bytes) -> bytes:
        reports.append(raw)
        return policy.handle(raw)

    figures = measure_load(SMALL, {"here": coordinator})
    assert len(figures.law_s) == len(figures.step_s["here"]) == SMALL.rounds
    assert figures.report_bytes == len(reports[-1]) and abs(figures.answer_bytes - update_bytes(law)) < 20
    # What the coordinator holds after all of them is what the law makes of the counts.
    state = law.initial_state()
    for step in range(len(reports)):
        assert decode(reports[step]).counts_M.equal(counts_of(law, step))  # type: ignore[union-attr]
        state = law.update(counts_of(law, step), state, step)
    assert policy._held[1].checksum == VersionedState(0, state).checksum


def test_a_coordinator_that_fails_is_an_error_and_not_a_quick_one() -> None:
    def dead(raw: bytes) -> bytes:
        raise ConnectionError("gone")

    with pytest.raises(RuntimeError, match="did not answer step 0: ConnectionError: gone"):
        drive(SMALL.make_law(), dead, 1)


def _measure(rank: int, world_size: int, case: ControlCase) -> tuple[RankFigures | None, set[int]]:
    reduced: dict[int, int] = {}
    inner = loop.tree_all_reduce

    def counting(sums: Any, maxima: Any, **options: Any) -> Any:
        size = dist.get_world_size(options["group"])
        reduced[size] = reduced.get(size, 0) + sum(tensor.nbytes for tensor in (*sums, maxima))
        return inner(sums, maxima, **options)

    loop.tree_all_reduce = counting
    try:
        figures = BenchRank().measure(case, CoordinatorPolicy().handle)
    finally:
        loop.tree_all_reduce = inner
    law, steps = case.make_law(), case.rounds + 3  # three warm up
    mine = [size for size in case.world_sizes if rank < size]
    return figures, {reduced[size] - steps * summed_bytes(law, size) for size in mine}


def test_rounds_are_those_of_all_ranks_and_the_modelled_bytes_are_what_they_reduce() -> None:
    by_rank = run_ranks(3, _measure, SMALL)
    figures, *others = [figures for figures, _ in by_rank]
    assert others == [None, None] and figures is not None
    assert [samples.world_size for samples in figures.rounds] == [1, 2, 3]
    for samples in figures.rounds:
        assert len(samples.seconds) == SMALL.rounds
        for index, seconds in enumerate(samples.seconds):
            parts = [phase[index] for phase in samples.phases.values()]
            assert min(parts) > 0 and sum(parts) < seconds  # rank 0 does one after the other
    assert all(len(seconds) == SMALL.rounds and min(seconds) > 0 for seconds in figures.hop_s.values())
    assert [differences for _, differences in by_rank] == [{0}] * 3


def test_the_command_measures_prints_and_leaves_samples_and_a_picture(
    ray_session: RaySession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--layers", "2", "--experts", "4", "--workers", "2", "--rounds", "2", "--law", "newton"]
    assert main(["bench", "coordinator", *sizes, "--out", str(tmp_path)]) == 0
    written = capsys.readouterr()
    record, picture = map(Path, written.out.split()[-2:])
    values = json.loads(record.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(values["loads"]) == {"sign", "newton", "quantile"}
    assert [row["world_size"] for row in values["ranks"]["rounds"]] == [1, 2]
    assert [row["world_size"] for row in values["modelled"]] == [2**power for power in range(1, 12)]
    # 32 bytes for each rank travel with the counts; one rank that was measured has nothing to model.
    lines = [line.split() for line in written.out.partition("Modelled: ")[0].splitlines()]
    rows = [words for words in lines if words and words[0].isdecimal()]
    assert [row[1] == "modelled" for row in rows] == [False, False] + [True] * 10
    said = " ".join(written.out.split())
    for words in ("law newton, 2 x 4 experts", "law function actor", "reduce coordinator broadcast", "Modelled: the"):
        assert words in said
    assert written.err.splitlines()[0] == "starting Ray"
