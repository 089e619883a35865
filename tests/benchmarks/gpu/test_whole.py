"""The whole script as a command, in small sizes, on an emulated device."""

import importlib.util
import json

import pytest

from benchmarks.gpu.layer import LIMIT, OURS, PLAIN, PLAIN_COMPILED, TITAN, TITAN_COMPILED
from benchmarks.gpu.section import SECTIONS
from tests.emulated_cuda.library import SITE, build_library, run_on_emulated_cuda

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is built for Linux only"),
    pytest.mark.slow,
]


def test_every_section_is_filled_or_says_why_not(tmp_path):
    out = tmp_path / "results"
    printed = run_on_emulated_cuda(
        "benchmarks.gpu",
        *("--small", "--out", str(out), "--scratch", str(tmp_path)),
        library=build_library(tmp_path),
        code=1,  # not all was measured
        PYTHONPATH=str(SITE),
        PYTEST_ADDOPTS="-p tests.emulated_cuda.in_tests",  # of the tests that it runs
    )
    assert printed == (out / "gpu.md").read_text()
    sections = json.loads((out / "gpu.json").read_text())["sections"]
    assert {name: section["state"] for name, section in sections.items()} == {
        name: "failed" if name == "profile" else "measured" for name in SECTIONS
    }
    assert "sees no kernels of a device" in sections["profile"]["error"]
    figures = {name: section["figures"] for name, section in sections.items()}
    assert [name for name, check in figures["checks"].items() if not check["passed"]] == []
    contestants = figures["layer"]["small"]["contestants"]
    assert all(contestants[name]["ms"] > 0 for name in (OURS, PLAIN, LIMIT))
    assert contestants[PLAIN_COMPILED]["refused"].startswith("NotCompiled")
    assert all(
        "ms" in contestants[name] or "torchtitan" in contestants[name]["refused"] for name in (TITAN, TITAN_COMPILED)
    )
    assert len(figures["kernels"]["small"]) == 5
    assert figures["training"]["tokens_per_s"] > 0
    assert figures["training"]["last_checkpoint"]["bytes"] > 0
    assert figures["profile"]["step_ms"] > 0
    assert all(figures["decoding"][dtype]["new_tokens"] > 0 for dtype in ("float32", "bfloat16"))
    assert figures["checkpoint"]["save_over_plain"]
    assert figures["dispatch"]["walls"].keys() == {"float32", "bfloat16"}
    assert not list(tmp_path.glob("trimtab-gpu-*"))
