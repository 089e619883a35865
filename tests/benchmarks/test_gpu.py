"""The figures of the GPU benchmark at a size that a CPU can do, and its page."""

import os

import pytest
import torch

from benchmarks import gpu
from runtime.commands.bench.dispatch.limits import Shape

CPU, TINY = torch.device("cpu"), Shape(6, 16, 8, 4, 2)


def test_a_layer_is_measured_beside_its_limit_and_shown(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    row = gpu.measure_layer(TINY, torch.float32, CPU)
    # 18 operations for each of 12 expert rows of 16 and 8.
    assert row["tflops"] * row["layer_ms"] * 1e9 == pytest.approx(18 * 12 * 16 * 8)
    assert row["limit_tflops"] > row["tflops"]
    kernel = {"SwiGLU": {"ms": 0.25, "gb_per_s": 2500.0}}
    checks = {"parity in float32": False}
    page = gpu.report(
        {"device": "d", "torch": "t", "checks": checks, "layers": {"one": row}, "kernels": {"one": kernel}}
    )
    assert "| parity in float32 | FAILED |" in page
    assert f"| {row['layer_ms']:.2f} | " in page
    assert "| SwiGLU | 0.250 | 2500 |" in page


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by tests/dispatch/kernels/test_interpreter.py"
)
def test_kernels_are_measured(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    monkeypatch.setattr(gpu, "COPY_BYTES", 1024)
    found = gpu.measure_kernels(TINY, torch.bfloat16, CPU)
    # 12 rows of gate and up, 8 wide, in and one out, 2 bytes each, and a weight of 4.
    assert found["SwiGLU"]["gb_per_s"] * found["SwiGLU"]["ms"] * 1e6 == pytest.approx(12 * (3 * 8 * 2 + 4))
    assert len(found) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys):
    with pytest.raises(SystemExit) as left:
        gpu.main([])
    assert left.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
