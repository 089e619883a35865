"""`trimtab doctor PATH` on directories that transformers wrote: sound, then with each kind of damage."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.cli import main
from tests.runtime.commands.doctor.test_checkpoint_doctor import examined
from tests.workers.model.families.directories import write_directory

HUB_EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
HUB_BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 of transformers in several files."""
    return write_directory(tmp_path_factory.mktemp("hub"), "deepseek_v3", max_shard_size="40KB")


@pytest.fixture
def hub_copy(hub: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub, tmp_path / "hub"))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_what_transformers_saved_is_sound(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = examined(write_directory(tmp_path, name), capsys)
    assert (code, text.splitlines()[-1]) == (0, "sound"), text


def test_rounded_and_untrained_biases_of_the_hub_are_warnings(tmp_path: Path, capsys: Any) -> None:
    folder = write_directory(tmp_path, "deepseek_v3", torch.bfloat16, max_shard_size="20KB")
    code, text = examined(folder, capsys)
    assert (code, text.splitlines()[-1]) == (0, "sound"), text
    assert f"{HUB_BIAS} is bfloat16; a bias must be float32" in text
    for layer in (1, 2):
        change_hub(folder, HUB_BIAS.replace("layers.2", f"layers.{layer}"), torch.zeros_like)
    code, text = examined(folder, capsys)
    assert code == 0
    assert "is zero, as in all layers: the model is untrained, or its biases were lost" in text


def test_weights_that_are_not_what_was_exported_are_named(hub_copy: Path, capsys: Any) -> None:
    file = hub_copy / json.loads((hub_copy / "model.safetensors.index.json").read_text())["weight_map"][HUB_EXPERT]
    tensors = load_file(file)
    digests = {name: hashlib.sha256(tensor.numpy().data).hexdigest() for name, tensor in tensors.items()}
    for factor, code in ((1.0, 0), (1.5, 1)):
        tensors[HUB_EXPERT] *= factor
        save_file(tensors, file, metadata={"format": "pt", "sha256": json.dumps(digests)})
        assert examined(hub_copy, capsys)[0] == code
    assert f"{HUB_EXPERT} is not what was exported" in examined(hub_copy, capsys)[1]


def change_hub(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def read_hub(folder: Path, name: str) -> Tensor:
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    return load_file(folder / file)[name]


def _hub_twin(folder: Path) -> None:
    other = read_hub(folder, HUB_EXPERT.replace("experts.3", "experts.9"))
    change_hub(folder, HUB_EXPERT, lambda _: other)


def _hub_poison(folder: Path) -> None:
    change_hub(folder, HUB_EXPERT, lambda tensor: tensor * float("inf"))


def _hub_zero_bias(folder: Path) -> None:
    change_hub(folder, HUB_BIAS, torch.zeros_like)


def _hub_wide(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    change_hub(folder, HUB_EXPERT, lambda tensor: tensor.half())


def _hub_cut(folder: Path) -> None:
    change_hub(folder, HUB_EXPERT, lambda tensor: tensor[:-1])


def _hub_truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])


def _hub_forget(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][HUB_EXPERT]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_hub_twin, "experts.9.down_proj.weight has the same bytes as"),
        (_hub_poison, f"{HUB_EXPERT} has NaN or infinite values: 512 of 512"),
        (_hub_zero_bias, f"{HUB_BIAS} is zero for every expert"),
        (_hub_wide, f"{HUB_EXPERT} is F16, and config.json says bfloat16"),
        (_hub_cut, f"{HUB_EXPERT} is (31, 16), and by config.json (32, 16)"),
        (_hub_truncate, "is damaged: "),
        (_hub_forget, f"holds {HUB_EXPERT}, but model.safetensors.index.json names no file for it"),
    ],
)
def test_damage_of_a_directory_of_hugging_face_is_named(
    damage: Callable[[Path], None], problem: str, hub_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examined(hub_copy, capsys)[0] == 0
    damage(hub_copy)
    code, text = examined(hub_copy, capsys)
    assert code == 1
    assert problem in text
    assert re.search(r"error: model-\d+-of-\d+\.safetensors", text), text


def test_a_step_is_of_a_run(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(hub), "--step", "3"]) == 2
    assert "--step (3) chooses a checkpoint of a run" in capsys.readouterr().err
