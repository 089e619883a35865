"""`trimtab bench dispatch`: what it counts, prints, writes and refuses, and that it leaves no process behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
import torch
import torch.distributed as dist

from dispatch.exchange.payload import Payload
from dispatch.exchange.placement import ExpertPlacement
from dispatch.parity import launch as launching
from dispatch.parity.launch import RankFailed, launch
from runtime.cli import main
from runtime.commands.bench.dispatch.benchmark import COLLECTIVE_LIMIT
from runtime.commands.bench.dispatch.case import case_of
from runtime.commands.bench.dispatch.choices import DTYPES, PAYLOADS
from runtime.commands.bench.dispatch.figures import figures_of
from runtime.commands.bench.dispatch.routes import Nodes, bytes_of_four_passes
from runtime.commands.bench.dispatch.table import as_text, closing_sentence
from runtime.commands.bench.dispatch.turns import DtypeSamples, LayerMeasurement, measure
from runtime.commands.command import read_options
from runtime.commands.results import new_name
from runtime.settings.config_file import load_config
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
SIZES = {"tokens": 8, "hidden": 8, "ffn-hidden": 4, "num-experts": 4, "top-k": 2, "threads": 1, "rounds": 2}
COMMAND = "runtime.commands.bench.dispatch.command"
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
MIB = 2**20
PNG = b"\x89PNG\r\n\x1a\n"


def options_of(*words: str) -> Namespace:
    return read_options(COMMAND, "trimtab bench dispatch", [*TINY, *words])


def measure_on_rank(rank: int, world_size: int, words: tuple[str, ...]) -> LayerMeasurement | None:
    case = case_of(options_of("--workers", str(world_size), "--device", "cpu", *words))
    return measure(dist.group.WORLD, torch.device("cpu"), case)


def measured(world_size: int, *words: str) -> LayerMeasurement:
    first, *others = run_ranks(world_size, measure_on_rank, words)
    assert first is not None
    assert others == [None] * (world_size - 1)
    return first


def sums_over_ranks(measurement: LayerMeasurement, candidate: str, *fields: str) -> list[float]:
    """Of each round, in the only dtype."""
    (result,) = measurement.by_dtype.values()
    ranks = result.samples[candidate]
    return [sum(sample[field] for sample in samples for field in fields) for samples in zip(*ranks, strict=True)]


# Workload W2: all tokens of both ranks choose the two experts of rank 0, so that the 8 tokens of rank 1 travel and
# those of rank 0 do not. A row has 8 fp32 elements: 32 bytes. Beside it travel 2 weights (4 bytes each) and 2 ids (1
# byte each), and back 2 gradients of weights.
#            dispatch        combine      back: combine    dispatch
#   rank 1 → rank 0: 8 x (32 + 10)          8 x 32
#   rank 0 → rank 1:                 8 x 32                8 x (32 + 8)
FLOOR, SENT = 4 * 8 * 32, 8 * (4 * 32 + 10 + 8)


@pytest.mark.parametrize(
    ("words", "link", "exchange"),
    [
        ((), "node", "rank"),
        (("--ranks-per-node", "1", "--exchange", "node"), "network", "node"),
        (("--chunks", "2"), "node", "rank"),
    ],
)
def test_bytes_of_a_forced_case_are_those_worked_by_hand(words: tuple[str, ...], link: str, exchange: str) -> None:
    found = measured(2, "--dtype", "float32", "--workload", "W2", "--exchange", "rank", *words)
    assert found.exchange == exchange
    assert sums_over_ranks(found, "layer", f"{link}_bytes") == [SENT] * 2
    assert sums_over_ranks(found, "layer", "node_bytes", "network_bytes") == [SENT] * 2
    assert sums_over_ranks(found, "layer", "floor_all_bytes") == [FLOOR] * 2
    assert sums_over_ranks(found, "layer", "floor_network_bytes") == [FLOOR if link == "network" else 0] * 2
    assert sums_over_ranks(found, "all-to-all", "bytes") == [SENT] * 2


def test_flops_and_load_of_a_forced_case_are_those_worked_by_hand() -> None:
    found = measured(2, "--dtype", "float32", "--workload", "W2")
    # 16 tokens with 2 experts each, 18 x 8 x 4 operations a row; the bare matmuls do as many, spread over both ranks.
    assert sums_over_ranks(found, "layer", "flops") == [32 * 18 * 8 * 4] * 2
    assert sums_over_ranks(found, "matmuls", "flops") == [32 * 18 * 8 * 4] * 2
    (result,) = found.by_dtype.values()
    assert [[sample["flops"] > 0 for sample in rounds] for rounds in result.samples["layer"]] == [
        [True] * 2,
        [False] * 2,
    ]
    # Each of the two hot experts has all 16 tokens, where 8 are the mean.
    assert sums_over_ranks(found, "layer", "busiest_over_mean") == [2 * 2.0] * 2


def test_load_is_that_of_one_step() -> None:
    # W6 has another hot expert in every step, with 1.5 times the mean, exact to a few of the 64 tokens.
    found = measured(2, "--dtype", "float32", "--workload", "W6", "--tokens", "32", "--rounds", "4")
    assert sums_over_ranks(found, "layer", "busiest_over_mean") == pytest.approx([2 * 1.5] * 4, rel=0.15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cost_of_an_exchange_by_assignment_is_seen(dtype: str) -> None:
    row, narrow = 8 * getattr(torch, dtype).itemsize, 4 + 1 + 4
    found = measured(2, "--dtype", dtype, "--workload", "W2", "--exchange", "assignment")
    assert sums_over_ranks(found, "layer", "node_bytes") == [8 * 2 * (4 * row + narrow)] * 2
    assert sums_over_ranks(found, "layer", "floor_all_bytes") == [8 * 4 * row] * 2


def test_one_worker_has_no_exchange_and_every_rank_of_ragged_sources_is_measured() -> None:
    alone = measured(1, "--dtype", "float32")
    (result,) = alone.by_dtype.values()
    assert (alone.exchange, set(result.samples)) == ("none", {"layer", "matmuls"})
    figures = figures_of(result)
    assert (figures.exchange, figures.bandwidth, figures.shares["wire"]) == (None, None, 0)
    assert "sent GiB/s" not in as_text(case_of(options_of("--workers", "1")), "none", {"float32": figures})
    uneven = measured(3, "--dtype", "float32", "--workload", "W5", "--num-experts", "7")
    (result,) = uneven.by_dtype.values()
    assert [len(rounds) for rounds in result.samples["layer"]] == [2, 2, 2]


def test_phases_fit_into_the_step_and_schedules_are_compared() -> None:
    (result,) = measured(2, "--dtype", "float32", "--chunks", "2").by_dtype.values()
    assert set(result.samples) == {"layer", "matmuls", "all-to-all", "no overlap", "uncut"}
    for sample in (sample for rounds in result.samples["layer"] for sample in rounds):
        phases = [sample[f"{phase}_s"] for phase in ("dispatch", "experts", "combine")]
        assert min(phases) > 0
        assert sum(phases) < sample["wall_s"]
    assert result.allocated_bytes > 0
    assert set(figures_of(result).others) == {"no overlap", "uncut"}


def sample(wall_s: float, **values: float) -> dict[str, float]:
    return {"wall_s": wall_s, "cpu_s": wall_s / 2, **values}


def layer_sample(wall_s: float, experts_s: float, sent: float) -> dict[str, float]:
    zero = dict.fromkeys(("network_bytes", "floor_all_bytes", "floor_network_bytes"), 0.0)
    phases = {"experts_s": experts_s, "dispatch_s": 1.0, "combine_s": 1.0}
    return sample(wall_s, **zero, **phases, node_bytes=sent, flops=60.0, busiest_over_mean=1.5)


def test_figures_of_samples_written_out() -> None:
    # Three rounds of two ranks. The second rank is slower; the last round is slow for all, which no ratio sees.
    samples = {
        "layer": [[layer_sample(t, 4, 8) for t in (8, 8, 80)], [layer_sample(t, 6, 0) for t in (10, 10, 100)]],
        "matmuls": [[sample(t, flops=60) for t in (4, 4, 40)], [sample(t, flops=60) for t in (5, 5, 50)]],
        "all-to-all": [[sample(t, bytes=8) for t in (1, 1, 10)], [sample(t, bytes=0) for t in (1, 1, 10)]],
        "uncut": [[sample(t) for t in (4, 4, 40)], [sample(t) for t in (20, 20, 200)]],
    }
    found = figures_of(DtypeSamples(samples, 7, None))
    assert (found.wall.measured, found.wall.bare, found.wall.ratio) == (10, 5, 2)
    assert found.cpu.ratio == 2
    assert found.phases == {"dispatch": 1, "experts": 5, "combine": 1, "rest": 3}
    assert (found.flops.measured, found.flops.bare) == (60 / 5, 60 / 4.5)
    assert found.exchange is not None
    assert found.bandwidth is not None
    assert (found.exchange.measured, found.exchange.bare) == (2, 1)
    assert (found.bandwidth.measured, found.bandwidth.bare) == (4 / 2, 4 / 1)  # a mean of 4 bytes a rank
    assert found.shares == pytest.approx({"matmul": 0.5, "wire": 0.1, "rest": 0.4})
    assert found.others["uncut"].ratio == 2
    assert closing_sentence("float32", found).endswith("bare matmuls 50.0 %, bare all-to-all 10.0 %, the rest 40.0 %.")
    hidden = closing_sentence("float32", replace(found, wire_share=0.6))
    assert hidden.endswith(
        "bare all-to-all 60.0 %, together more than it takes: they overlap, or the machine is too busy."
    )


def test_least_bytes_of_choices_written_out() -> None:
    # 8 experts on 4 ranks, nodes of 2: ranks 0 and 1, ranks 2 and 3. Seen from rank 0:
    #   token 0 needs ranks 0 1; token 1 needs ranks 2 3, one node; token 2 needs rank 0 twice
    ids_TK = torch.tensor([[0, 2], [4, 6], [0, 1]])
    floor = Nodes(rank=0, size=2).floor_bytes(ids_TK, ExpertPlacement(8, 4), row_bytes=10)
    assert floor == {"all": 30, "network": 10}
    # One way of four in 8 bits: 256 codes and 2 scales of 4 bytes.
    assert bytes_of_four_passes(256, 4, "compute") == 4 * 1024
    assert bytes_of_four_passes(256, 4, "fp8") == 3 * 1024 + 264


def test_the_command_prints_every_figure_and_writes_samples_and_picture(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "dispatch", *TINY, "--device", "cpu", "--out", str(tmp_path / "new" / "bench")]) == 0
    written = capfd.readouterr()
    for words in (
        "8 tokens a rank, hidden 8, ffn_hidden 4, 4 experts, top-2",
        "2 workers on cpu, 1 thread each, exchange rank (auto)",
        "dispatch ", "experts ", "combine ", "rest: router", "step, wall time",
        "wall ms, beside matmuls", "CPU ms of a rank, beside matmuls", "matmul GF/s, experts phase",
        "sent GiB/s in dispatch + combine", "inside the node", "between nodes", "a row per token and rank",
        "peak memory, torch's allocator", "peak memory, resident set", "busiest expert, x mean",
        "float32, of the step: bare matmuls", "bfloat16, of the step: bare matmuls",
    ):  # fmt: skip
        assert words in written.out
    assert written.err.splitlines()[0] == "[1/2] float32: memory"
    assert "USDT" not in written.err
    record, picture = map(Path, written.out.split()[-2:])
    assert picture.read_bytes().startswith(PNG)
    values = json.loads(record.read_text())
    assert values["case"]["moe"]["num_experts"] == 4
    assert set(values["figures"]) == {"float32", "bfloat16"}
    assert [len(rounds) for rounds in values["samples"]["float32"]["all-to-all"]] == [2, 2]


def test_a_result_never_replaces_another(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    names = []
    for _ in range(3):
        names.append(new_name(tmp_path, now))
        names[-1].touch()
    assert [path.name for path in names] == ["20260102-030405.json", "20260102-030405-2.json", "20260102-030405-3.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "TARGET"),
        (["dispach"], "'dispach' is no target; did you mean dispatch?"),
        (["coordinator", "--rounds", "0"], "--rounds: '0' must be a whole number of at least 1"),
        (["coordinator", "--law", "sine"], "balance.law is 'sine'; it must be one of none, sign"),
        (["coordinator", "--experts", "20000"], "--layers (61) x --experts (20000) must be at most 1048576 together"),
        (["coordinator", "--out", __file__], "cannot be made: File exists"),
        (["dispatch", "--workers", "0"], "--workers: '0' must be a whole number of at least 1"),
        (["dispatch", "--workers", "5", *TINY], "ep_size (5) must be between 1 and num_experts (4)"),
        (["dispatch", "--top-k", "65"], "top_k (65) must be between 1 and num_experts (64)"),
        (["dispatch", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["dispatch", "--exchange", "ring"], "invalid choice: 'ring'"),
        (["dispatch", "--ranks-per-node", "3"], "--ranks-per-node (3) must divide the number of workers (2)"),
        (["dispatch", "--tokens", "3"], "2 x 3 tokens, 8 experts each, leave 64 experts without a row"),
        (["dispatch", "--workload", "W9"], "workload is 'W9'; it must be one of W0, W1"),
        (["dispatch", "--workload", "W1", "--skew", "900"], "skew (900) must be between 1 and"),
        (["dispatch", "--skew", "nan"], "--skew: 'nan' must be a number from 1 to 1000"),
        (["dispatch", "--skew", "2"], "--skew (2) belongs to a workload; add --workload W1"),
        (["dispatch", "--workload", "W1", "--hidden", "32"], "needs --hidden (32) of at least --num-experts (64)"),
        (["dispatch", "--config", "tinny"], "--config tinny: there is no such file or preset; did you mean tiny?"),
        (["dispatch", "--out", __file__], "cannot be made: File exists; give a folder that can be written"),
        (["dispatch", "--device", "cuda", "--workers", "64"], "--device cuda needs a CUDA device for each of 64 ranks"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2_before_a_process_starts(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "spawn", lambda *_, **__: pytest.fail("a process was started"))
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_gives_what_the_options_leave_out() -> None:
    config = load_config("tiny")
    case = case_of(
        read_options(COMMAND, "trimtab bench dispatch", ["--config", "tiny", "--workers", "1", "--top-k", "3"])
    )
    assert (case.hidden, case.moe.num_experts, case.moe.ffn_hidden, case.moe.score) == (32, 8, 32, "sigmoid")
    assert (case.moe.top_k, case.moe.num_shared_experts) == (3, 0)
    # 4 sequences over the 2 workers of the training, whatever the benchmark has.
    assert case.tokens == 2 * config.model.max_seq_len
    assert case.dtypes == (config.run.dtype,)


def test_an_exchange_that_cannot_be_repeated_bare_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("parallel:\n  exchange: deep_ep\n")
    with pytest.raises(ValueError, match="exchange 'deep_ep' has messages of its own"):
        case_of(read_options(COMMAND, "trimtab bench dispatch", ["--config", str(tmp_path / "deep.yaml")]))


def test_under_a_launcher_its_ranks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    case = case_of(options_of())
    assert (case.workers, case.ranks_per_node) == (4, 2)
    with pytest.raises(ValueError, match=r"--workers \(3\) must be the world size of the launcher \(4\)"):
        case_of(options_of("--workers", "3"))


def test_the_choices_of_the_options_are_those_of_the_layer() -> None:
    assert get_args(Payload) == PAYLOADS


def fail_on_rank_1(group: dist.ProcessGroup, device: torch.device) -> int:
    if dist.get_rank(group) == 1:
        raise OSError("no room here")
    dist.barrier(group)
    return 0


def test_a_rank_that_fails_is_named_and_takes_the_others_along() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed.*OSError: no room here"):
        launch(2, "cpu", COLLECTIVE_LIMIT, fail_on_rank_1)
    assert not ranks_of_ours()


HELD: list[object] = []  # by a rank until its process ends


def leave_collectives_under_way(group: dist.ProcessGroup, device: torch.device) -> str:
    for _ in range(20):
        # Views known to Python: the thread of gloo that frees them last needs the GIL for it.
        sent, arrived = torch.ones(64, 64), torch.empty(64, 64)
        dist.all_to_all_single(arrived.detach(), sent.detach(), group=group, async_op=True)
    HELD.append(group)
    return "done"


def test_a_rank_whose_threads_still_hold_tensors_ends_well() -> None:
    assert launch(2, "cpu", COLLECTIVE_LIMIT, leave_collectives_under_way) == "done"


def interrupt_the_parent(group: dist.ProcessGroup, device: torch.device) -> None:
    dist.barrier(group)
    if dist.get_rank(group) == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


def test_an_interrupt_ends_the_ranks_before_the_caller_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        launch(2, "cpu", COLLECTIVE_LIMIT, interrupt_the_parent)
    assert not ranks_of_ours()


def ranks_of_ours() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


# While the ranks import, from a terminal, which signals them all; and while they measure, to the command alone.
@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interrupted_measurement_leaves_no_process_and_no_traceback(early: bool, tmp_path: Path) -> None:
    script = "import sys; from runtime.cli import main; sys.exit(main())"
    words = ["bench", "dispatch", *TINY, "--rounds", "1000000", "--device", "cpu", "--out", str(tmp_path)]
    command: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "start_new_session": True}
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **command
    ) as bench:
        assert bench.stderr is not None
        if early:
            wait_until(lambda: num_importing(bench.pid) == 2)
            os.killpg(bench.pid, signal.SIGINT)
        else:
            while "warming up" not in bench.stderr.readline():
                pass
            bench.send_signal(signal.SIGINT)
        out, err = bench.communicate(timeout=300)
    assert (bench.returncode, out, err) == (130, "", "trimtab: stopped\n")
    wait_until(lambda: not session_of(bench.pid))
    assert not list(tmp_path.iterdir())


def num_importing(parent: int) -> int:
    """Its children that are as large as Python alone is not."""
    return sum(child.memory_info().rss > 50 * MIB for child in psutil.Process(parent).children())


def wait_until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def session_of(leader: int) -> list[psutil.Process]:
    """Who lives in it. Zombies do not: it is for init to take them away."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
