"""The code for CUDA, run on a machine without it: see tests/emulated_cuda."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from tests.emulated_cuda.library import SITE, build_library, run_on_emulated_cuda

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is built for Linux only"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_library(tmp_path_factory.mktemp("library"))


def test_trainings_on_an_emulated_device_give_what_they_give_on_the_cpu(library):
    cases = Path(__file__).with_name("on_emulated_cuda.py")
    printed = run_on_emulated_cuda("pytest", "-q", "-p", "no:cacheprovider", str(cases), library=library)
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) >= 9  # a file that skips itself would prove nothing


def test_a_machine_with_two_gpus_trains_on_both_without_being_told(library, tmp_path):
    start = ("train", "--config", "tiny", "--steps", "2", "--run.dir", str(tmp_path), "--name", "gpus")
    printed = run_on_emulated_cuda("runtime", *start, library=library, PYTHONPATH=str(SITE))
    assert re.search(r"rank 0 .* cuda 0", printed) and re.search(r"rank 1 .* cuda 1", printed)
    settings = yaml.safe_load((tmp_path / "gpus" / "config.yaml").read_text())
    assert (settings["cluster"]["num_workers"], settings["run"]["dtype"]) == (2, "bfloat16")
    assert re.search(r"Tokens lost +0 ", printed) and re.search(r"checksums equal +2 of 2", printed)


def test_what_is_marked_gpu_passes_on_two_emulated_devices(library):
    """With NCCL's place taken by gloo; DeepEP has no stand-in there."""
    plugins = ("-p", "no:cacheprovider", "-p", "tests.emulated_cuda.in_tests")
    printed = run_on_emulated_cuda(
        "pytest", "-q", *plugins, "-m", "gpu", "tests/dispatch", library=library, PYTHONPATH=str(SITE)
    )
    (passed,), (skipped,) = (re.findall(rf"(\d+) {outcome}", printed) for outcome in ("passed", "skipped"))
    assert int(passed) >= 28
    assert int(skipped) == 1, printed  # DeepEP's
