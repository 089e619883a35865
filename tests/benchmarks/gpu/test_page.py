"""The page of the GPU benchmark: goals, and what is said of sections that failed."""

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.goals import judge
from benchmarks.gpu.layer import LIMIT, OURS, TITAN_COMPILED
from benchmarks.gpu.page import page

FOUND = {"device": "d", "torch": "t", "began": "b", "command": "c", "small": False, "seconds": 100.0}


def _found(**sections):
    whole = {"state": "measured", "error": "", "seconds": 2.0}
    return FOUND | {"sections": {name: whole | {"figures": figures} for name, figures in sections.items()}}


def _goal(found, text):
    (goal,) = [goal for goal in judge(found) if goal.text == text]
    return goal


def test_goals_are_met_missed_or_not_measured():
    contestants = {
        LIMIT: {"ms": 1.0, "tflops": 700.0, "times_limit": 1.0},
        OURS: {"ms": 1.5, "tflops": 466.0, "times_limit": 1.5, "ours_over_it": 1.0, "peak_mib": 3000.0},
        TITAN_COMPILED: {"ms": 1.7, "tflops": 411.0, "times_limit": 1.7, "ours_over_it": 0.88, "peak_mib": 3600.0},
    }
    found = _found(
        layer={"qwen3": {"shape": {"tokens": 32768}, "contestants": contestants}},
        decoding={
            d: {"tokens_per_s": r, "new_tokens": 9, "prefill_s": 0.1}
            for d, r in (("float32", 530.0), ("bfloat16", 500.0))
        },
        checkpoint={
            "gigabytes": 4,
            "copy": {"made_s": 1.0, "stopped_s": 0.01, "arrived_s": 0.2},
            "save_over_plain": [1.7, 1.4, 1.6],
        },
    )
    verdicts = {goal.text: goal.met for goal in judge(found)}
    assert verdicts["layer at qwen3, TFLOP/s"] is True
    assert verdicts["layer at qwen3, times as fast as compiled torchtitan"] is False  # 1.14, 1.2 are wanted
    assert verdicts["layer at qwen3, MiB, compiled torchtitan's"] is True
    assert verdicts["layer at olmoe, TFLOP/s"] is None
    assert verdicts["training of paper-1b, tokens/s"] is None
    assert verdicts["decoding one prompt in fp32, tokens/s"] is True
    assert verdicts["decoding one prompt in bf16, tokens/s, fp32's"] is False
    assert verdicts["a checkpoint, times a plain write with fsync"] is False
    assert verdicts["a checkpoint stops training, s, the copy's"] is True
    assert _goal(found, "a checkpoint, times a plain write with fsync").measured == "1.60"
    text = page(found)
    assert "| layer at qwen3, TFLOP/s | ≥ 440 | 466 | yes |" in text
    assert "| layer at qwen3, times as fast as compiled torchtitan | ≥ 1.20 | 1.14 | NO |" in text
    assert "| layer at olmoe, TFLOP/s | ≥ 440 | not measured | — |" in text


def test_a_layer_faster_than_its_limit_fails_its_goal():
    walls = {
        d: {"measured": 0.001, "bare": 0.002, "ratio": ratio} for d, ratio in (("float32", 1.2), ("bfloat16", 0.5))
    }
    found = _found(dispatch={"sizes": {}, "walls": walls})
    assert _goal(found, "bench dispatch, layer in multiples of its limit").met is False
    assert "FASTER THAN ITS LIMIT" in page(found)


def test_a_section_that_failed_says_so_beside_what_it_told_before():
    found = _found(checks={"parity in float32": {"passed": False, "said": "rank 0 failed"}})
    found["sections"]["profile"] = {
        "state": "failed",
        "error": "OutOfMemoryError: 80 GB",
        "seconds": 3.0,
        "figures": {"step_ms": 250.0, "tokens_per_s": 262144.0, "peak_mib": 51 * 1024},
    }
    found["sections"]["training"] = {"state": "interrupted", "error": "", "seconds": 3.0, "figures": {}}
    text = page(found)
    assert "**failed** after 3 s. OutOfMemoryError: 80 GB\n\nWithout the profiler a step takes 250.0 ms" in text
    assert "**interrupted** after 3 s.\n\nNo figures." in text
    assert "| parity in float32 | FAILED | rank 0 failed |" in text
    assert "| parity in float32 | passes | failed | NO |" in text
    assert "| training of paper-1b, GiB at most | ≤ 51.0 | 51.0 | yes |" in text


def test_small_sizes_are_judged_by_no_goal():
    text = page(_found() | {"small": True})
    assert "the goals do not apply" in text
    assert "280,000" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        command.main(["--out", str(tmp_path / "results")])
    assert left.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
