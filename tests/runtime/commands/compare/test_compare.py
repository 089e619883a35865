"""`trimtab compare` without training: methods, plan, options, and the numbers from records that are written here."""

import dataclasses
import io
import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from runtime.cli import main
from runtime.commands.command import read_options
from runtime.commands.compare import comparison
from runtime.commands.compare.command import check_options
from runtime.commands.compare.comparison import plan_of
from runtime.commands.compare.methods import parse_method, parse_methods, with_values
from runtime.commands.compare.outcome import SeedStats, read_outcome, steps_until_below
from runtime.commands.compare.plan import ComparePlan, RunKey, grown
from runtime.commands.compare.run_pool import EndedRun, last_step
from runtime.commands.compare.tables import print_tables, write_results
from runtime.commands.compare.view import CompareView
from runtime.settings.config_file import load_config

LAWS = ["--laws", "sign:u=0.003", "newton"]


def make_plan(out: Path, *specs: str, num_seeds: int = 2, **values: Any) -> ComparePlan:
    """Settings by dotted name, "__" for the dot. The base is tiny, with one worker."""
    settings = {"cluster.num_workers": 1} | {name.replace("__", "."): value for name, value in values.items()}
    base = with_values(load_config("tiny"), settings)
    return ComparePlan(out, parse_methods(specs or ("sign", "none")), num_seeds, base)


# Methods


def test_a_law_is_a_balance_section_of_its_own() -> None:
    base = with_values(load_config("small"), {"balance.law": "rms", "balance.rate": 6e-3})
    config = with_values(base, parse_method("sign:u=0.003").values)
    assert (config.balance.law, config.balance.rate) == ("sign", 0.003)
    # The rate of the base is for its law, not for this one.
    assert with_values(base, parse_method("newton").values).balance.rate is None


def test_a_loss_leaves_the_bias_alone_and_a_law_has_no_loss() -> None:
    with_loss = with_values(load_config("small"), parse_method("aux:alpha=0.01").values)
    assert (with_loss.aux.loss, with_loss.aux.alpha, with_loss.balance.law) == ("switch", 0.01, "none")
    assert with_values(with_loss, parse_method("newton").values).aux.loss == "none"


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("aux:alpha=0.001", {"balance.law": "none", "aux.loss": "switch", "aux.alpha": 0.001}),
        ("global_batch:alpha=0.01", {"balance.law": "none", "aux.loss": "global_batch", "aux.alpha": 0.01}),
        ("sequence:alpha=1e-4,z_alpha=0.5", {"aux.loss": "sequence", "aux.alpha": 1e-4, "aux.z_alpha": 0.5}),
        ("sign:u=0.001+sequence:alpha=1e-4", {"balance.law": "sign", "balance.rate": 1e-3, "aux.loss": "sequence"}),
        ("newton", {"balance.law": "newton", "aux.loss": "none"}),
    ],
)
def test_a_spec_names_a_law_or_a_loss_or_both(spec: str, values: dict[str, Any]) -> None:
    assert values.items() <= parse_method(spec).values.items()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["aux"], "must be alpha or z_alpha and a number"),
        (["aux:z_alpha=1"], "say how strong the loss is, as in aux:alpha=0.001"),
        (["aux:alpha=much"], "alpha is 'much'; it must be a number"),
        (["sign+newton"], "at most one law and one loss"),
        (["aux:alpha=1+sequence:alpha=1"], "at most one law and one loss"),
        (["sine"], "balance.law is 'sine'; it must be one of"),
        (["sign:u=1", "sign,u=1"], "balance.law is 'sign,u=1'"),
        (["newton", "newton"], "names newton and newton; give each method once"),
    ],
)
def test_wrong_methods_are_refused(specs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods(specs)


def test_a_section_is_built_once_with_all_its_values() -> None:
    # One after the other, num_experts 2 would contradict the top_k of before.
    config = with_values(load_config("small"), {"model.moe.num_experts": 2, "model.moe.top_k": 1})
    assert (config.model.moe.num_experts, config.model.moe.top_k) == (2, 1)
    with pytest.raises(ValueError, match=r"there is no setting model\.wings"):
        with_values(config, {"model.wings": 2})


# Options and plan


def parse_options(arguments: list[str]) -> Namespace:
    options = read_options("runtime.commands.compare.command", "trimtab compare", arguments)
    check_options(options)
    return options


def test_settings_may_stand_anywhere_between_the_options(tmp_path: Path) -> None:
    arguments = ["--steps", "7", *LAWS, "--run.seed", "5", "--seeds", "2", "--config", "tiny", "--out", str(tmp_path)]
    plan = plan_of(parse_options([*arguments, "--workers=1"]))
    assert [method.spec for method in plan.methods] == ["sign:u=0.003", "newton"]
    assert [str(key) for key in plan.runs] == [
        "sign:u=0.003 seed 5", "newton seed 5", "sign:u=0.003 seed 6", "newton seed 6"
    ]  # fmt: skip
    key = list(plan.runs)[2]
    config = plan.config_of(key)
    assert (config.run.steps, config.run.seed, config.run.name) == (7, 6, "seed_6")
    assert Path(config.run.dir, config.run.name) == plan.run_dir(key) == tmp_path / "sign-u-0.003" / "seed_6"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--laws is missing"),
        (["--laws", "newtn"], "--laws newtn: balance.law is 'newtn'"),
        (["--laws", "sign:u=fast"], "--laws sign:u=fast: rate is 'fast'"),
        (["--laws", "sign:u"], "--laws sign:u: 'u' must be KEY=VALUE"),
        (["--laws", "sing"], "--laws sing: "),
        (["--resume", "--config", "tiny"], "--config cannot be given"),
        (["--resume"], "there is no comparison in"),
        ([*LAWS, "--model.hiden", "3"], "unknown option --model.hiden; did you mean --model.hidden"),
        ([*LAWS, "--model.moe.num_groups", "4", "--model.moe.num_experts", "6"], "num_groups"),
        (
            ["--laws", "quantile", "--model.moe.num_groups", "4", "--model.moe.groups_kept", "2"],
            "quantile: balance.law",
        ),
    ],
)
def test_wrong_command_lines_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(parse_options([*arguments, "--out", str(tmp_path / "new")]))


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "sign:u=0.003", "smebu:beta=0.9", data__mix=(0.5, 0.5), num_seeds=4)
    plan.write()
    assert ComparePlan.read(tmp_path) == plan
    with pytest.raises(ValueError, match=r"there is a comparison in .* already; go on with --resume"):
        plan_of(parse_options([*LAWS, "--out", str(tmp_path)]))
    (tmp_path / "compare.yaml").write_text("laws: [sign]\n")
    with pytest.raises(ValueError, match=r"compare.yaml is damaged"):
        ComparePlan.read(tmp_path)


def test_a_resumed_comparison_keeps_its_settings_and_may_grow(tmp_path: Path) -> None:
    plan = dataclasses.replace(make_plan(tmp_path, "sign"), out=tmp_path.absolute())
    plan.write()

    def resume(*arguments: str) -> ComparePlan:
        return plan_of(parse_options(["--resume", "--out", str(tmp_path), *arguments]))

    assert resume() == resume("--steps", "20", "--laws", "sign") == plan
    more = resume("--laws", "newton", "sign", "--seeds", "3")
    assert ([method.spec for method in more.methods], more.num_seeds) == (["sign", "newton"], 3)
    changed = r"must keep model.hidden \(was 32, now 64\), optim.lr \(was 0.002, now 0.01\)"
    with pytest.raises(ValueError, match=changed):
        resume("--model.hidden", "64", "--optim.lr", "0.01")
    with pytest.raises(ValueError, match=r"--seeds 1: the comparison in .* has 2, give no fewer"):
        resume("--seeds", "1")
    assert grown(plan, plan) == plan


def test_memory_is_asked_for_as_many_runs_as_there_are_however_many_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def refuse(config: ClusterConfig, *_: object, **__: object) -> None:
        asked.append(config.num_workers)
        raise InvalidValue("no memory")

    monkeypatch.setattr(comparison, "usable_cores", lambda: 64)
    monkeypatch.setattr(comparison, "check_resources", refuse)
    words = ["--seeds", "1", "--config", "tiny", "--workers", "1", "--out", str(tmp_path / "new")]
    assert main(["compare", *LAWS, *words]) == 2
    assert "no memory" in capsys.readouterr().err
    assert asked == [2]


# Numbers


def write_run(plan: ComparePlan, key: RunKey, max_vio: list[float], val_loss: float, *, finished: bool = True) -> None:
    """The records of a run whose bits per byte are twice its loss and whose held-out MaxVio is a tenth of it."""
    run_dir = plan.run_dir(key)
    run_dir.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "max_vio_batch": vio, "max_vio_computation_batch": 2 * vio, "step_s": step}
        for step, vio in enumerate(max_vio, 1)
    ]
    bits = {"plays": val_loss, "python": 3 * val_loss}
    in_mix = val_loss / 20 if plan.base.data.mix else None
    lines.append(
        {
            "kind": "eval", "step": len(max_vio), "val_loss": val_loss, "val_bits_per_byte": 2 * val_loss,
            "val_bits_per_byte_per_source": bits, "max_vio_held_out": val_loss / 10, "max_vio_held_out_in_mix": in_mix,
            "max_vio_global": 99.0,
        }
    )  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = {"time": 0, "event": "finished" if finished else "interrupted", "step": len(max_vio)}
    (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")


# 20 steps, the mix shifts at step 11. Balanced means below 0.3.
SHIFTED = {"run__steps": 20, "data__mix": (0.9, 0.1), "data__mix_after": (0.1, 0.9), "data__shift_at": 11}
QUICK = [0.9, 0.9, *[0.2] * 8, 0.8, *[0.2] * 8, 0.1]
SLOW = [1.0] * 10 + [0.2] * 10


@pytest.fixture
def compared(tmp_path: Path) -> ComparePlan:
    plan = make_plan(tmp_path, "newton", "sign", "none", **SHIFTED)
    newton, sign, none = plan.methods
    write_run(plan, RunKey(newton, 0), QUICK, 1.0)
    write_run(plan, RunKey(newton, 1), QUICK, 2.0)
    write_run(plan, RunKey(sign, 0), SLOW, 1.5)
    write_run(plan, RunKey(sign, 1), QUICK, 2.1)
    write_run(plan, RunKey(none, 0), SLOW[:5], 9.0, finished=False)
    return plan


def test_numbers_are_those_of_the_records(compared: ComparePlan) -> None:
    outcome = read_outcome(compared, None)
    assert outcome is not None
    assert [method.spec for method in outcome.methods] == ["newton", "sign"]  # the third has no finished run
    assert outcome.floor == pytest.approx(0.2)  # newton, steps 9 and 10
    assert outcome.threshold == pytest.approx(0.3)
    newton, sign = outcome.methods
    values = {name: list(spread.values) for name, spread in newton.measures.items()}
    assert values["val_perplexity"] == [math.exp(1.0), math.exp(2.0)]
    assert values["val_bits_per_byte"] == [2.0, 4.0]
    assert values["max_vio_global_in_mix"] == [0.05, 0.1]
    assert values["max_vio_global"] == [0.1, 0.2]  # held out, not that of the training load
    assert values["max_vio_batch_before_shift"] == pytest.approx([0.2] * 2)
    assert values["max_vio_batch_peak_after_shift"] == pytest.approx([0.32] * 2)  # steps 11 to 15
    assert values["max_vio_batch"] == pytest.approx([0.15] * 2)  # steps 19 and 20
    assert values["max_vio_computation_batch"] == pytest.approx([0.3] * 2)
    assert values["step_s"] == [10.5, 10.5]
    # Steps 3 to 7 are the first five below; after the shift steps 12 to 16, the 6th from there.
    assert (values["steps_to_balance"], values["steps_to_recover"]) == ([7, 7], [6, 6])
    assert sign.measures["steps_to_balance"].values == (None, 7)  # balanced after the shift alone is never
    assert sign.measures["steps_to_recover"].values == (5, 6)
    assert sign.against_first.values == (1.0, pytest.approx(0.2))  # bits per byte, seed by seed
    assert newton.measures["val_bits_per_byte"] == SeedStats((2.0, 4.0), 3.0, pytest.approx(math.sqrt(2)))


def test_a_threshold_can_be_given(compared: ComparePlan) -> None:
    outcome = read_outcome(compared, 1.1)
    assert outcome is not None
    assert outcome.threshold == 1.1
    assert outcome.methods[1].measures["steps_to_balance"].values == (5, 5)


def test_tables_say_what_was_measured_and_how_often(compared: ComparePlan, tmp_path: Path) -> None:
    outcome = read_outcome(compared, None)
    assert outcome is not None
    for path in write_results(outcome, tmp_path):
        assert path.stat().st_size > 500
    text = (tmp_path / "compare.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["method", "perplexity", "MaxVio_global"]
    assert rows[2] == [
        "newton", "5.054 ± 3.303", "0.150 ± 0.071", "0.075 ± 0.035", "0.150 ± 0.000", "0.300 ± 0.000", "10.5 s"
    ]  # fmt: skip
    assert rows[6] == ["newton", "7 ± 0", "0.200 ± 0.000", "0.320 ± 0.000", "6 ± 0"]
    assert rows[7][1] == "7 (1 of 2)"
    assert rows[-1] == ["sign", "3.6000 ± 0.8485", "1.8000 ± 0.4243", "5.4000 ± 1.2728", "+0.6000 ± 0.5657"]
    assert "below 0.300 (1.5 times the lowest that any method held, 0.200)" in " ".join(text.split())
    assert "shifts at step 11 of 20" in " ".join(text.split())
    numbers = json.loads((tmp_path / "compare.json").read_text())
    assert numbers["methods"][1]["measures"]["steps_to_balance"]["values"] == [None, 7]
    assert numbers["methods"][0]["max_vio_batch_curves"][0] == QUICK
    with (tmp_path / "terminal.txt").open("w") as stream:
        print_tables(outcome, Console(file=stream))
    assert "5.054 ± 3.303" in (tmp_path / "terminal.txt").read_text()


def test_without_a_shift_there_is_nothing_to_recover_from(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "newton", num_seeds=1, run__steps=20)
    write_run(plan, next(plan.runs), QUICK, 1.0)
    outcome = read_outcome(plan, None)
    assert outcome is not None
    assert outcome.floor == pytest.approx(0.15)
    write_results(outcome, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "recover" not in text and "shift" not in text
    assert "| newton | 2.718 | 0.100 | 0.150 | 0.300 | 10.5 s |" in text
    assert "| newton | 7 |" in text


def test_nothing_finished_is_nothing_to_compare(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    assert read_outcome(plan, None) is None
    write_run(plan, next(plan.runs), SLOW, 1.0, finished=False)
    assert read_outcome(plan, None) is None


def test_steps_until_below_counts_to_the_last_of_five() -> None:
    assert steps_until_below(np.array([0.1] * 5), 0.2) == 5
    assert steps_until_below(np.array([0.9] + [0.1] * 6), 0.2) == 6
    assert steps_until_below(np.array([0.1] * 4), 0.2) is None
    assert steps_until_below(np.array([0.2] * 9), 0.2) is None


def test_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr')
    assert last_step(path) == 2
    path.write_text("".join(json.dumps({"step": step, "filler": "x" * 3000}) + "\n" for step in range(40)))
    assert last_step(path) == 39


# The view


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def active_run(plan: ComparePlan, key: RunKey, step: int) -> Any:
    return SimpleNamespace(key=key, step=step)


def test_plain_view_says_what_runs_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    plan, clock = make_plan(tmp_path, "newton", "none", run__steps=20), Clock()
    first, second, *_ = keys = list(plan.runs)
    write_run(plan, keys[3], SLOW, 1.0)  # done before
    stream = io.StringIO()
    with CompareView(plan, keys[:3], Console(file=stream, width=200), clock=clock) as view:
        clock.now += 31
        view.show([active_run(plan, first, 10), active_run(plan, second, 5)])
        clock.now += 1
        view.show([active_run(plan, first, 11), active_run(plan, second, 6)])  # too soon for another line
        write_run(plan, first, SLOW, 1.0)
        clock.now += 8
        view.ended(EndedRun(first, 40.0, None))
        view.ended(EndedRun(second, 40.0, "exit code 1: broken"))
        view.ended(EndedRun(keys[2], 1.0, None))
    assert stream.getvalue().splitlines() == [
        # 15 of 60 steps in 31 s.
        "1/4 runs, 0:31, left 1:33; newton seed 0 at step 10, none seed 0 at step 5",
        # 26 of 60 in 40 s, 34 are left.
        "newton seed 0 done in 0:40; 2/4 runs, 0:40, left 0:52",
        "none seed 0 failed after 0:40: exit code 1: broken",
        "newton seed 1 stopped, saved",
    ]


def test_a_terminal_sees_a_bar_for_each_active_run(tmp_path: Path) -> None:
    plan, clock = make_plan(tmp_path, "newton", "none", run__steps=20), Clock()
    view = CompareView(plan, list(plan.runs), Console(file=io.StringIO()), clock=clock)
    clock.now += 10
    view.show([active_run(plan, next(plan.runs), 8)])
    console = Console(file=io.StringIO(), width=60)
    console.print(view._frame())
    bar, summary = console.file.getvalue().splitlines()
    assert bar.startswith("newton seed 0") and bar.endswith("8/20")
    assert summary.rstrip() == "0/4 runs, 0:10, left 1:30"
