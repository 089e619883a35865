"""The race harness with our layer and layers made up here: no peer is needed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from benchmarks.peers.__main__ import Output, cases_of, parse
from benchmarks.peers.case import CHECK_MARGIN, Case, LayerWeights, TokenSource, common_component, hottest_over_mean
from benchmarks.peers.contestant import Contestant, Setting
from benchmarks.peers.launch import RaceFailed, race
from benchmarks.peers.meters import WireMeter
from benchmarks.peers.oracle import refusal
from benchmarks.peers.race import LIMIT, Entry, Outcome, run_case
from benchmarks.peers.registry import ENTRANTS
from benchmarks.peers.report import as_markdown, as_text, outcome_from_json, summary
from runtime.commands.bench.dispatch.limits import Shape
from runtime.commands.bench.dispatch.memory import peak_allocated_bytes, peak_resident_bytes
from tests.ranks import run_ranks

SMALL = Case(
    shape_name="small",
    shape=Shape(tokens=48, hidden=32, ffn_hidden=16, num_experts=8, top_k=2),
    dtype_name="float32",
    ep_size=1,
    skewed=False,
    threads=1,
    allocator="default",
    rounds=2,
)
MIB = 2**20


def quiet(text: str) -> None:
    pass


def absent(setting: Setting, weights: LayerWeights) -> Contestant:
    raise ModuleNotFoundError("No module named 'absent'\nand a second line")


def wrong_gradient(setting: Setting, weights: LayerWeights) -> Contestant:
    layer = ENTRANTS["trimtab"](setting, weights)

    def read_grads() -> LayerWeights:
        right = layer.read_grads()
        return dataclasses.replace(right, up_EFH=right.up_EFH * 1.01)

    return dataclasses.replace(layer, read_grads=read_grads)


def keeps_memory(setting: Setting, weights: LayerWeights) -> Contestant:
    layer, kept = ENTRANTS["trimtab"](setting, weights), []

    def forward(x_TH: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append(torch.ones(MIB))  # 4 MiB
        return layer.forward(x_TH)

    return dataclasses.replace(layer, forward=forward)


def broken_on_the_last_rank(setting: Setting, weights: LayerWeights) -> Contestant:
    if setting.ep_rank == setting.ep_size - 1:
        raise OSError("no room here")
    return ENTRANTS["trimtab"](setting, weights)


def race_on_rank(rank: int, world_size: int, case: Case) -> Outcome:
    builders = {
        "trimtab": ENTRANTS["trimtab"],
        "keeper": keeps_memory,
        "wrong": wrong_gradient,
        "absent": absent,
        "broken": broken_on_the_last_rank,
    }
    return run_case(case, builders, dist.group.WORLD, quiet)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_a_right_layer_races_and_all_others_are_named_with_the_reason(world_size: int, dtype_name: str) -> None:
    case = dataclasses.replace(SMALL, ep_size=world_size, dtype_name=dtype_name, skewed=True)
    outcome, *others = run_ranks(world_size, race_on_rank, case)
    assert all(other == outcome for other in others)
    ours, limit = outcome.entries["trimtab"], outcome.entries[LIMIT]
    assert ours.reason is None
    assert len(ours.wall_s) == len(ours.cpu_s) == len(limit.wall_s) == case.rounds
    assert ours.allocated_bytes > 0
    assert (ours.wire_bytes > 0) == (world_size == 2)
    assert outcome.entries["absent"].reason == "ModuleNotFoundError: No module named 'absent'"
    assert outcome.entries["broken"].reason == "OSError: no room here"
    assert outcome.entries["absent"].wall_s == outcome.entries["broken"].wall_s == []


@pytest.fixture(scope="module")
def small_outcome() -> Outcome:
    [outcome] = run_ranks(1, race_on_rank, SMALL)
    return outcome


def test_memory_that_a_layer_keeps_between_steps_is_its_memory(small_outcome: Outcome) -> None:
    ours, keeper = small_outcome.entries["trimtab"], small_outcome.entries["keeper"]
    assert keeper.allocated_bytes - ours.allocated_bytes > 3.9 * MIB
    assert keeper.resident_bytes - ours.resident_bytes > 3 * MIB


def test_a_layer_with_one_wrong_gradient_is_refused(small_outcome: Outcome) -> None:
    refused = small_outcome.entries["wrong"]
    assert refused.reason == "wrong results: relative error of up 1.0e-02, allowed 1e-05"
    assert refused.errors["up"] == pytest.approx(0.01, rel=0.01)
    assert max(error for name, error in refused.errors.items() if name != "up") < 1e-5
    assert refused.wall_s == []


def test_results_that_are_not_numbers_are_refused() -> None:
    assert refusal({"y": 1e-7, "dx": float("nan")}, torch.float32) is not None
    assert refusal({"y": 1e-7, "dx": 1e-6}, torch.float32) is None


def bytes_of_known_exchanges(rank: int, world_size: int) -> list[int]:
    # Rows of 4 fp32 = 16 bytes. Rank 0 keeps 3 of its 8 and sends 5, rank 1 sends 2 of its 6 and keeps 4.
    inputs, outputs = ([3, 5], [3, 2]) if rank == 0 else ([2, 4], [5, 4])
    rows = torch.ones(sum(inputs), 4, requires_grad=True)
    counted = []
    with WireMeter() as wire:
        dist.all_to_all_single(torch.empty(sum(outputs), 4), rows.detach(), outputs, inputs)
    counted.append(wire.num_bytes)
    with WireMeter() as wire:  # the way back carries what came: 2 rows from rank 0, 5 from rank 1
        all_to_all_single_autograd(rows, outputs, inputs, dist.group.WORLD).sum().backward()
    counted.append(wire.num_bytes)
    with WireMeter() as wire:
        dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
        dist.all_reduce(torch.ones(4))
        dist.barrier()
    return [*counted, wire.num_bytes]


def test_bytes_to_other_ranks_are_counted_as_worked_out_by_hand() -> None:
    assert run_ranks(2, bytes_of_known_exchanges) == [[80, 80 + 32, 32], [32, 32 + 80, 32]]


def broadcast_under_the_meter(rank: int, world_size: int) -> None:
    with WireMeter():
        dist.broadcast(torch.ones(1), 0)


def test_a_collective_that_the_meter_does_not_know_is_not_taken_for_free() -> None:
    with pytest.raises(Exception, match="does not know how many bytes broadcast_ sends"):
        run_ranks(1, broadcast_under_the_meter)


def _peaks_of_a_step(_rank: int, _world_size: int) -> tuple[int, int]:
    def step() -> None:
        first, second = torch.ones(4 * MIB), torch.ones(2 * MIB)  # 16 + 8 MiB
        del first
        third = torch.ones(3 * MIB)  # 8 + 12 MiB
        del second, third

    return peak_allocated_bytes(step), peak_resident_bytes(step)


def test_memory_is_the_peak_of_the_step_not_its_sum() -> None:
    # In a process of its own, as in the race: what tests before this one left of the heap decides what is given back.
    [(allocated, resident)] = run_ranks(1, _peaks_of_a_step)
    assert allocated == 24 * MIB
    assert 23 * MIB < resident < 34 * MIB  # pages of others may be let go meanwhile


def test_skewed_tokens_load_the_hottest_expert_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = LayerWeights.draw(Shape(1, 64, 8, 16, 2), torch.float32, generator)
    common_H = common_component(weights, 2, generator)
    source = TokenSource(weights.router_EH, 2, torch.float32, common_H, generator)
    load = hottest_over_mean(source.draw(8192).detach() @ weights.router_EH.t(), 2)
    assert load == pytest.approx(3.7, rel=0.05)
    assert hottest_over_mean(torch.randn(8192, 64, generator=generator) @ weights.router_EH.t(), 2) < 2


def test_tokens_of_the_check_choose_their_experts_clearly() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = LayerWeights.draw(Shape(1, 64, 8, 16, 2), torch.bfloat16, generator)
    source = TokenSource(weights.router_EH, 2, torch.bfloat16, torch.zeros(64), generator)
    x_TH = source.draw_clear(500)
    best = (x_TH.detach().float() @ weights.router_EH.t()).topk(3).values
    assert x_TH.shape == (500, 64)
    assert (best[:, 1] - best[:, 2]).min() > CHECK_MARGIN


def known_outcome() -> Outcome:
    limit = Entry(wall_s=[1.0, 2.0, 4.0], cpu_s=[1.0, 1.0, 1.0])
    ours = Entry(wall_s=[2.0, 3.0, 4.0], cpu_s=[3.0, 2.0, 2.0], errors={"y": 1e-7, "dx": 2e-7}, wire_bytes=3 * MIB)
    return Outcome(1.25, {LIMIT: limit, "trimtab": ours, "absent": Entry(reason="ModuleNotFoundError: not here")})


def test_ratios_are_taken_inside_a_round() -> None:
    outcome = known_outcome()
    assert outcome.ratios("trimtab", LIMIT) == [2.0, 1.5, 1.0]
    figures = summary(outcome)
    assert figures["trimtab"] == {
        "wall_s": 3.0,
        "wall_over_limit": 1.5,
        "wall_over_ours": 1.0,
        "cpu_s": 2.0,
        "cpu_over_limit": 2.0,
        "allocated_mib": 0.0,
        "resident_mib": 0.0,
        "wire_mib": 3.0,
        "error": 2e-7,
    }
    assert figures[LIMIT]["wall_over_ours"] == pytest.approx(2 / 3)
    assert "absent" not in figures


def test_both_tables_name_who_did_not_race() -> None:
    versions = {"trimtab": "0.1.0", "absent": ""}
    text, markdown = as_text(SMALL, known_outcome(), versions), as_markdown(SMALL, known_outcome(), versions)
    for table in (text, markdown):
        assert "absent did not race: ModuleNotFoundError: not here" in table
        assert "trimtab 0.1.0" in table
        assert "busiest expert 1.25 x mean" in table
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_the_command_races_every_combination() -> None:
    several = ["--shapes", "tiny", "mid", "--ep", "1", "2"]
    cases = cases_of(parse([*several, "--dtypes", "bfloat16", "--skew", "skewed", "--threads", "2", "--rounds", "3"]))
    assert [(case.ep_size, case.shape_name) for case in cases] == [(1, "tiny"), (1, "mid"), (2, "tiny"), (2, "mid")]
    assert {(case.dtype_name, case.skewed, case.threads, case.rounds) for case in cases} == {("bfloat16", True, 2, 3)}


def test_results_are_written_race_by_race(tmp_path: Path) -> None:
    output = Output(tmp_path / "new" / "race.v1")
    output.begin({"cpu": "some"})
    output.add({"number": 1}, "first\n")
    output.add({"number": 2}, "second\n")
    records = [json.loads(line) for line in (tmp_path / "new" / "race.v1.jsonl").read_text().splitlines()]
    assert records == [{"number": 1}, {"number": 2}]
    assert (tmp_path / "new" / "race.v1.md").read_text().endswith("first\n\nsecond\n\n")


def test_fresh_processes_race_and_report() -> None:
    said: list[str] = []
    outcome = outcome_from_json(race(dataclasses.replace(SMALL, ep_size=2), ["trimtab"], said.append))
    assert outcome.entries["trimtab"].reason is None
    assert len(outcome.entries["trimtab"].wall_s) == SMALL.rounds
    assert "building and checking trimtab" in said


def test_a_rank_that_dies_is_reported_with_its_last_words() -> None:
    with pytest.raises(RaceFailed, match=r"rank 0 ended with exit code 1:(?s:.*)KeyError: 'nobody'"):
        race(SMALL, ["nobody"], quiet)
