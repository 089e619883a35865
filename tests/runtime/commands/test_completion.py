"""What the shell offers behind `trimtab`, asked as argcomplete's function of a shell asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "config.yaml").write_text("run: {steps: 3}\n")
    return folder


def offered(folder: Path, line: str) -> list[str]:
    """The words that fit behind the end of `line`, through the shell's own function."""
    words = line.split(" ")
    script = f"""
        eval "$(register-python-argcomplete trimtab)"
        COMP_LINE="{line}" COMP_POINT={len(line)} COMP_TYPE=63 COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}
        _python_argcomplete trimtab "{words[-1]}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], check=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()


def test_commands_and_their_actions_are_offered(folder: Path) -> None:
    assert offered(folder, "trimtab re") == ["report", "replay"]
    assert offered(folder, "trimtab cluster manifest ") == ["--help", "kuberay", "slurm", "ray-up"]


def test_options_and_the_names_of_runs_are_offered(folder: Path) -> None:
    assert offered(folder, "trimtab eval fi") == ["first"]
    assert "--sequences" in offered(folder, "trimtab eval first --")


def test_settings_their_values_and_presets_are_offered_where_settings_may_stand(folder: Path) -> None:
    assert offered(folder, "trimtab compare --balance.sch") == ["--balance.schedule"]
    assert offered(folder, "trimtab train --balance.law ada") == ["adaptive"]
    assert offered(folder, "trimtab train --config t") == ["tiny"]
