"""Builds `library.cpp`, and says where the emulated device runs: in a process that loads it before torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("library.cpp")
ROOT = Path(__file__).parents[2]
SITE = Path(__file__).with_name("site")  # on PYTHONPATH, for processes that are not the test's to start
STARTED_BY = "TRIMTAB_EMULATED_CUDA"


def run_on_emulated_cuda(module: str, *args: str, library: Path, code: int = 0, **variables: str) -> str:
    """What `python -m module` prints, in a process that can have the emulated device. code: that it must end with."""
    variables |= {"LD_PRELOAD": str(library), "TRITON_INTERPRET": "1", STARTED_BY: "1"}
    command = [sys.executable, "-m", module, *args]
    ended = subprocess.run(command, check=False, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


def skip_elsewhere() -> None:
    """Skip the module in a process without the emulated device."""
    if STARTED_BY not in os.environ:
        pytest.skip("run by tests/workers/test_emulated_cuda.py", allow_module_level=True)


def build_library(folder: Path) -> Path:
    """Compile it into the folder. Skips the test where no compiler is."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, g++")
    torch_folder, library = Path(torch.__file__).parent, folder / "emulated_cuda.so"
    includes, libraries = torch_folder / "include", torch_folder / "lib"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", str(SOURCE), f"-I{includes}", f"-L{libraries}"]
    command += [f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library
