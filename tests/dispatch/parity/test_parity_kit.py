"""The parity kit passes what is right, names what is wrong, and runs alone, under torchrun and with a foreign layer."""

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dispatch.parity.cases import CASES, draw_batches, draw_weights
from dispatch.parity.check import check
from dispatch.parity.command import _checked, _parser, load_adapter, main, report
from dispatch.parity.layers import VARIANTS, adapter_of
from dispatch.parity.workloads import WORKLOADS
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]


def _cases(*globs):
    return [case for case in CASES if any(fnmatch.fnmatch(case.name, glob) for glob in globs)]


def _checked_on_ranks(rank, world_size, layers, globs, dtype):
    torch.use_deterministic_algorithms(True)
    adapters = {name: load_adapter(name) if ":" in name else adapter_of(name) for name in layers}
    return check(_cases(*globs), adapters, dist.group.WORLD, dtype=dtype)


def _rows(layers, *globs, world_size=2, dtype="float64"):
    by_rank = run_ranks(world_size, _checked_on_ranks, layers, globs, dtype)
    assert all(rows == by_rank[0] for rows in by_rank)
    return by_rank[0]


def _told(mistake, *globs):
    return report(_rows([f"tests.dispatch.parity.parity_mistakes:{mistake}"], *globs), "a test")


def test_there_is_a_case_for_each_workload_and_names_differ():
    assert {case.workload for case in CASES} == {*WORKLOADS, None}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_dispatcher_passes_in_each_dtype(dtype):
    rows = _rows(list(VARIANTS), "shared*", "rank-without*", "W2*", "W5*", dtype=dtype)
    assert [(row.case, row.layer) for row in rows if row.failures] == []
    assert len(rows) == 4 * len(VARIANTS)
    # Not equal bit for bit: then the reference would not be another computation.
    assert all(row.worst(column) > 0 for row in rows for column in ("outputs", "dx", "gradients", "weights"))


def test_a_layer_that_shares_no_code_with_ours_passes():  # P1
    rows = _rows(["tests.dispatch.exchange.gathered_layer:build"], "plain", "top-*", "*rank*", "all-to*", "W*")
    assert len(rows) == 15
    assert [row.case for row in rows if row.failures] == []


def test_each_rank_has_other_tokens():
    for case in CASES:
        first, second, *_ = draw_batches(case, 4, draw_weights(case, torch.float64, 0), 0)
        assert first.x_TH.shape != second.x_TH.shape or not torch.equal(first.x_TH, second.x_TH) or not len(first.x_TH)


def test_an_expert_gradient_times_ep_size_is_named():  # B13, P5
    told = _told("expert_gradients_times_ep_size", "plain")
    for name in ("expert_gate", "expert_up", "expert_down"):
        assert f"gradients: {name} on rank 1: relative error 1.0e+00 (limit 1e-10), largest element" in told
    assert "gradients: norm on rank 0" in told
    assert "gradients: router" not in told
    assert "outputs: " not in told
    assert told.endswith("0 of 1 equal, 1 FAILED\n")


def test_a_dropped_token_is_named_on_its_rank():
    told = _told("last_token_of_rank_1_is_dropped", "plain")
    assert "outputs: y on rank 1: relative error 1.0e+00" in told
    assert "dx: dx on rank 1" in told
    assert "y on rank 0" not in told


def test_a_bias_in_the_weights_shows_once_it_is_not_zero():  # P14
    plain, forced = _rows(
        ["tests.dispatch.parity.parity_mistakes:bias_is_in_the_weights"], "plain", "all-to-first-rank"
    )
    assert {d.column for d in plain.failures} == {"weights"}  # the bias is zero until the law moves it
    assert all("AdamW" in d.tensor for d in plain.failures)
    assert {d.tensor for d in forced.failures} >= {"y", "dx", "router"}


def test_a_choice_counted_twice_is_named():
    told = _told("choices_are_counted_twice", "plain")
    assert "outputs: load on rank 0: relative error 1.0e+00" in told
    assert "outputs: y" not in told


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("gate_and_up_are_swapped_on_rank_1", "outputs: y on rank 0"),  # its tokens go there
        ("input_has_no_gradient_by_the_router", "dx: dx on rank 0"),
        ("down_projections_are_not_read", "gradients: expert_down on rank 1: relative error inf .* missing"),
        ("experts_have_no_gradient", "gradients: expert_up on rank 0: relative error inf .* not a number"),
        ("an_unwritten_row_is_used", "outputs: y on rank 1: relative error inf .* not a number"),
    ],
)
def test_other_mistakes_are_named(mistake, complaint):
    (row,) = _rows([f"tests.dispatch.parity.parity_mistakes:{mistake}"], "plain")
    text = report([row], "a test")
    assert row.failures
    assert any(fnmatch.fnmatch(line, f"*{complaint.replace(' .* ', '*')}*") for line in text.splitlines()), text


def _command(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", *arguments], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_fails_with_code_1():
    layer = "tests.dispatch.parity.parity_mistakes:expert_gradients_times_ep_size"
    found = _command("dispatch.parity", "--ep", "2", "--cases", "plain", "--layer", layer)
    assert found.returncode == 1, found.stderr
    assert "gradients: expert_gate on rank 1: relative error 1.0e+00" in found.stdout
    assert found.stdout.endswith("0 of 1 equal, 1 FAILED\n")


@pytest.mark.slow
def test_the_command_runs_under_torchrun():
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = _command(*launcher, "-m", "dispatch.parity", "--cases", "top-1", "W7*")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("PASS") == 2 * len(VARIANTS)
    assert "ep 2, cpu, float64, seed 0" in found.stdout


def test_the_command_lists_what_there_is(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(case.name in listed for case in CASES)
    assert all(variant in listed for variant in VARIANTS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ep", "0"], "--ep (0) must be between 1 and 8"),
        (["--ep", "9"], "--ep (9) must be between 1 and 8"),
        (["--cases", "W9*"], "--cases 'W9*' matches none of plain, top-1"),
        (["--dispatchers", "telepathy"], "--dispatchers 'telepathy' matches none of rank, assignment"),
        (["--layer", "torch"], "--layer is 'torch'; it must be package.module:function"),
        (["--layer", "no_such_module:build"], "No module named 'no_such_module'; start where"),
        (["--layer", "torch:no_such_function"], "torch has no function 'no_such_function'"),
        (["--layer", "a.b:c", "--dispatchers", "rank"], "give one of them"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_wrong_options_are_explained(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


def test_options_that_depend_on_where_it_runs_are_explained():
    parse = _parser().parse_args
    with pytest.raises(ValueError, match=r"--ep \(2\) needs a CUDA device for each rank and there are 1; lower --ep"):
        _checked(parse(["--device", "cuda"]), None, 1)
    with pytest.raises(ValueError, match=r"--ep \(2\) must be the world size of the launcher \(4\); leave --ep out"):
        _checked(parse(["--ep", "2"]), 4, 0)
    assert _checked(parse([]), 4, 0).ep == 4
    assert _checked(parse([]), None, 0).ep == 2
