"""A Python module that only a run names is not imported, unless the user names it too."""

import json
import sys
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.commands.replay.starts import read_starts
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config_file import config_from_yaml_file, config_to_yaml, load_config


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose settings name a module that lies beside it, and can be imported."""
    run, name = tmp_path / "run", f"payload_{tmp_path.name}"
    run.mkdir()
    text = config_to_yaml(load_config("tiny")).replace("module: null", f"module: {name}")
    assert name in text
    (run / CONFIG_FILE).write_text(text)
    (run / "metrics.jsonl").write_text("")
    event = {"event": "started", "step": 0, "time": 1.0, "balance": {"module": name}}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    return run


@pytest.mark.parametrize("command", ["eval {}", "generate {} --prompt a", "train --resume {}", "plan {}", "report {}"])
def test_no_command_imports_what_a_run_names(hostile: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(command.format(hostile).split())
    assert not (hostile.parent / "ran").exists()
    assert code in (1, 2) or "report" in command
    if "report" not in command:
        assert f"--balance.module payload_{hostile.parent.name}" in capsys.readouterr().err


def test_events_of_a_run_import_nothing_either(hostile: Path) -> None:
    with pytest.raises(ValueError, match=r"adding --balance\.module payload_"):
        read_starts(hostile)
    assert not (hostile.parent / "ran").exists()


def test_the_users_own_file_and_option_are_consent(hostile: Path) -> None:
    name = f"payload_{hostile.parent.name}"
    main(["plan", str(hostile), "--balance.module", name])
    assert (hostile.parent / "ran").exists()
    assert config_from_yaml_file(hostile / CONFIG_FILE).balance.module == name
    del sys.modules[name]
    assert load_config(str(hostile / CONFIG_FILE)).balance.module == name
