import importlib.util
import subprocess
import sys

import pytest

from dispatch.errors import UserError
from runtime.loggers.logger import NEEDED, check_installed
from workers.run_config import LOGGERS


def test_every_logger_that_the_setting_takes_has_its_package_named() -> None:
    assert tuple(NEEDED) == LOGGERS


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else sys)
    check_installed(["tensorboard", "mlflow"])
    with pytest.raises(
        UserError, match=r"run.log_to names wandb, .* pip install 'trimtab\[wandb\]', or leave wandb out"
    ):
        check_installed(["tensorboard", "wandb"])


def test_the_process_beside_a_run_imports_no_torch() -> None:
    code = "import sys, runtime.loggers.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
