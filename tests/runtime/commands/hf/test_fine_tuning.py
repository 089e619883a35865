"""A model of Hugging Face, fine-tuned on conversations with parts of it frozen, and written back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.cli import main
from runtime.settings.config_file import config_to_yaml, read_run_config
from tests.ranks import run_ranks
from tests.runtime.commands.hf.test_round_trip import _train_all, all_tensors, export, import_run
from tests.workers.model.families.directories import write_directory
from workers.data.chat import load_template

GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]
FROZEN = {"router": (".mlp.gate.",), "experts": (".mlp.experts.",)}


def test_a_tuned_model_differs_from_the_imported_one_in_what_was_not_frozen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_directory(tmp_path / "source", "deepseek_v3")
    lines = [{"prompt": f"w{2 + n % 50} w{2 + n * 7 % 57}", "completion": f"w{2 + n * n % 53}"} for n in range(80)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ["--data.path", str(tmp_path / "chat.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]
    data += ["--data.format", "chat", "--data.val_fraction", "0.3", "--balance.law", "sign"]
    for part in FROZEN:
        import_run(source, tmp_path / f"run {part}", *data, "--optim.freeze", f"[{part}]")
    run_ranks(2, _train_all, tmp_path)
    before = all_tensors(source)
    for part, names in FROZEN.items():
        export(tmp_path / f"run {part}", tmp_path / part)
        after = all_tensors(tmp_path / part)
        kept = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
        # The bias of a frozen router is under its name, .mlp.gate.e_score_correction_bias; other biases move.
        assert kept == {name for name in before if any(each in name for each in names)}, part
    _check_chat(tmp_path / "run router", tmp_path, capsys)


def _check_chat(run_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate --chat` prints what the model adds to the conversation that the template writes."""
    (folder / "chat.jinja").write_text(
        "{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    given = ["generate", str(run_dir), *GREEDY]
    template = load_template(str(folder / "chat.jinja"), None)
    config = read_run_config(run_dir)
    (run_dir / "config.yaml").write_text(
        config_to_yaml(replace(config, data=replace(config.data, chat_template=str(folder / "chat.jinja"))))
    )
    capsys.readouterr()
    assert main([*given, "--chat", "--system", "w3", "--prompt", "w4 w5"]) == 0
    reply, speed = capsys.readouterr()
    assert "prefill 4 tokens" in speed  # system, user, user, and what asks for a reply
    messages = [{"role": "system", "content": "w3"}, {"role": "user", "content": "w4 w5"}]
    assert (asked := template.render_prompt(messages)) == "w3 w4 w5 w9"
    assert main([*given, "--prompt", asked]) == 0
    assert capsys.readouterr().out == asked + reply and reply.strip()
    assert main([*given, "--system", "w3", "--prompt", "w4"]) == 2
    assert "add --chat" in capsys.readouterr().err
