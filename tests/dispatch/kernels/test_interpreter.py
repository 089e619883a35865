"""The tests of the kernels in a process with Triton's interpreter: what they compute, not how fast or how aligned."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = ("tests/dispatch/kernels", "tests/dispatch/experts/test_fused.py", "tests/benchmarks/gpu/test_layer.py")
PLAN = "tests/runtime/commands/plan/test_activations.py::test_formula_equals_what_torch_keeps"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is built for Linux only"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process has the interpreter already"),
]


def _num_passed(*tests):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    found = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    (passed,) = re.findall(r"(\d+) passed", found.stdout)
    return int(passed)


def test_the_kernels_are_right_in_the_interpreter():
    assert _num_passed(*FILES) >= 20  # a file that skips itself would prove nothing


@pytest.mark.slow
def test_the_plan_of_memory_is_right_for_experts_on_the_kernels():
    assert _num_passed(*(f"{PLAN}[{name}-bfloat16-none]" for name in ("latent", "experts one by one"))) == 2
