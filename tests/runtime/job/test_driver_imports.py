"""A driver starts its workers sooner for what it does not import."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("what", ["torch._dynamo", "torch.distributed.tensor", "matplotlib", "workers.training.step"])
def test_the_driver_imports_nothing_that_only_others_need(driver_imports, what):
    assert not {name for name in driver_imports if name == what or name.startswith(f"{what}.")}


@pytest.fixture(scope="module")
def driver_imports() -> set[str]:
    """What a driver has imported when it starts its workers."""
    code = (
        "import sys\nimport runtime.job.job\nfrom runtime.settings.config_file import parse_train\n"
        "from runtime.settings.size import count_parameters\n"
        "count_parameters(parse_train(['--config=tiny', '--device=cpu']).config.model)\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
