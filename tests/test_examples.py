"""The examples run as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_without_torchrun_the_example_says_how_to_start_it():
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, ROOT / "examples" / "train_layer.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "error: start it by torchrun: torchrun --nproc-per-node 2 examples/train_layer.py" in done.stderr


def test_the_layer_trains_under_plain_torchrun():
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2", "--standalone"]
    script = ROOT / "examples" / "train_layer.py"
    done = subprocess.run([*command, script, "--steps=40"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"error ([\d.]+)  MaxVio ([\d.]+)", done.stdout)
    errors, vios = zip(*((float(error), float(vio)) for error, vio in lines), strict=True)
    assert errors[-1] < 0.2 * errors[0]
    assert vios[-1] < 0.5 * vios[0]
    assert len(script.read_text().splitlines()) <= 100
