"""The code for CUDA, run on a machine without it: see tests/emulated_cuda."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.emulated_cuda.library import run_on_emulated_cuda

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is built for Linux only")


@pytest.mark.slow
def test_trainings_on_an_emulated_device_give_what_they_give_on_the_cpu(tmp_path):
    printed = run_on_emulated_cuda(Path(__file__).with_name("on_emulated_cuda.py"), tmp_path)
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) >= 10  # a file that skips itself would prove nothing
