"""Layer and kernels of the GPU benchmark at a size that a CPU can do."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu import kernels, layer
from benchmarks.gpu.sizes import SMALL
from runtime.commands.bench.dispatch.limits import Shape
from tests.ranks import run_ranks

CPU, TINY = torch.device("cpu"), Shape(32, 16, 8, 4, 2)
SIZES = replace(SMALL, shapes={"tiny": TINY}, copy_bytes=1024, rounds=3)


def _measured(rank, world_size, *names, dtype=torch.float32):
    assert dist.get_world_size() == 1
    builders = {name: build for name, build in layer.builders().items() if name in names}
    layer.builders = lambda: builders
    return layer.measure_shape(TINY, dtype, CPU, SIZES)


def test_ours_is_measured_beside_the_limit_and_plain_torch_and_who_is_missing_is_named():
    (found,) = run_ranks(1, _measured, layer.OURS, layer.PLAIN, layer.TITAN)
    rows = found["contestants"]
    # 18 operations for each of 64 expert rows of 16 and 8.
    for name in (layer.OURS, layer.PLAIN, layer.LIMIT):
        assert rows[name]["tflops"] * rows[name]["ms"] * 1e9 == pytest.approx(18 * 64 * 16 * 8)
    for name in (layer.OURS, layer.PLAIN):
        assert rows[name]["error"] < 1e-5
        assert rows[name]["peak_mib"] > 0
    assert rows[layer.LIMIT]["times_limit"] == rows[layer.OURS]["ours_over_it"] == 1
    assert rows[layer.TITAN] == {"refused": "ModuleNotFoundError: torchtitan is not installed"}
    lines = layer.show({"tiny": found})
    assert f"| trimtab | {rows[layer.OURS]['ms']:.2f} | " in "\n".join(lines)
    assert any(
        "| torchtitan | not measured: ModuleNotFoundError: torchtitan is not installed" in line for line in lines
    )


@pytest.mark.slow
def test_what_torch_compiles_is_measured_as_compiled():
    # In bf16: torch compiles its grouped matmul in no other dtype.
    (found,) = run_ranks(1, partial(_measured, dtype=torch.bfloat16), layer.PLAIN, layer.PLAIN_COMPILED)
    assert found["contestants"][layer.PLAIN_COMPILED]["ms"] > 0


def _not_compiled(rank, world_size):
    layer.torch.compile = lambda function: function
    return _measured(rank, world_size, layer.PLAIN_COMPILED)


def test_what_torch_runs_without_compiling_has_no_figure():
    (found,) = run_ranks(1, _not_compiled)
    assert found["contestants"][layer.PLAIN_COMPILED].keys() == {"refused"}


def _wrong_layer(setting, weights):
    made = layer.plain_torch.build(setting, weights)
    return replace(made, forward=lambda x: 1.1 * made.forward(x))


def _measured_with_a_wrong_one(rank, world_size):
    layer.builders = lambda: {layer.OURS: _wrong_layer, layer.PLAIN: layer.plain_torch.build}
    return layer.measure_shape(TINY, torch.float32, CPU, SIZES)["contestants"]


def test_a_layer_that_computes_something_else_has_no_figure():
    (rows,) = run_ranks(1, _measured_with_a_wrong_one)
    assert "wrong results" in rows[layer.OURS]["refused"]
    assert "ms" not in rows[layer.OURS]
    assert "ours_over_it" not in rows[layer.PLAIN]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by tests/dispatch/kernels/test_interpreter.py"
)
def test_kernels_are_measured():
    found = kernels.measure_kernels(Shape(6, 16, 8, 4, 2), torch.bfloat16, CPU, SIZES)
    # 12 rows of gate and up, 8 wide, in and one out, 2 bytes each, and a weight of 4.
    assert found["SwiGLU"]["gb_per_s"] * found["SwiGLU"]["ms"] * 1e6 == pytest.approx(12 * (3 * 8 * 2 + 4))
    assert len(found) == 5
    assert f"| tiny | SwiGLU | {found['SwiGLU']['ms']:.3f} | " in "\n".join(kernels.show({"tiny": found}))
