"""`trimtab doctor PATH` on checkpoints of a real gang: sound, then with each kind of damage."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.cli import main
from runtime.commands.bench.dispatch.memory import peak_resident_bytes
from runtime.commands.doctor.checkpoint.findings import CheckpointReport
from runtime.commands.doctor.checkpoint.ours import examine_checkpoint
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config import RunBalanceConfig, TrainConfig
from runtime.settings.config_file import config_to_yaml
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import (
    CHECKPOINTS,
    INDEX,
    MANIFEST,
    digest,
    list_checkpoints,
    read_manifest,
    write_manifest,
)
from workers.checkpoints.index import read_index
from workers.checkpoints.tensor_reader import TensorReader
from workers.training.worker_spec import WorkerSpec

EXPERT = "model.layers.1.moe.experts.3.down_proj"
BIAS = "model.layers.2.moe.router.expert_bias_E"
Tensors = dict[str, Tensor]


def _train(rank: int, world_size: int, spec: WorkerSpec) -> None:
    join_worker(spec, rank, world_size, "gang").train()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, EP 2, five steps under the law sign, saved at steps 2 and 5."""
    folder = tmp_path_factory.mktemp("run")
    spec = make_spec(folder, checkpoint_every=2)
    run_ranks(2, _train, spec)
    balance = RunBalanceConfig(law=spec.balance.law, rate=spec.balance.rate)
    config = TrainConfig(run=spec.run, model=spec.model, balance=balance, optim=spec.optim, parallel=spec.parallel)
    (spec.run_dir / CONFIG_FILE).write_text(config_to_yaml(config))
    return spec.run_dir


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of its own to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def examined(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["doctor", str(path), *options])
    written = capsys.readouterr()
    return code, written.out + written.err


def newest(run_dir: Path) -> Path:
    return list_checkpoints(run_dir / CHECKPOINTS)[-1]


def describe_again(path: Path) -> None:
    """A manifest that fits the files as they are now, as of a mistake before saving."""
    manifest = read_manifest(path)
    files = {file.name: digest(file) for file in path.iterdir() if file.name != MANIFEST}
    write_manifest(path, replace(manifest, files=files))


def save_changed(run_dir: Path, change: Callable[[Tensors], Any]) -> None:
    """The newest checkpoint with other tensors, complete and described as they are."""
    path = newest(run_dir)
    reader = TensorReader(path)
    tensors = reader.read(reader.shapes)
    change(tensors)
    checkpoint.save(path.parent, reader.manifest.step, tensors, reader.manifest.extra, None, world_size=2)


def test_what_a_gang_saved_is_sound_in_training_and_after(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, options, step in [(run, (), 5), (run, ("--step", "2"), 2), (newest(run), (), 5)]:
        code, text = examined(path, capsys, *options)
        assert (code, text.splitlines()[-1]) == (0, "sound"), text
        assert f"step      {step}, saved by 2 ranks" in text
        assert "experts   32 weights in 2 layers" in text
        assert re.search(r"biases +from -0\.0\d+ to 0\.0\d+", text)


def test_a_checkpoint_on_its_own_is_examined_by_what_it_tells(copy: Path, tmp_path: Path, capsys: Any) -> None:
    alone = Path(shutil.copytree(newest(copy), tmp_path / "alone"))
    assert examined(alone, capsys)[0] == 0
    save_changed(copy, lambda tensors: (_lose_bias(tensors), _lose_weight(tensors)))
    shutil.rmtree(alone)
    shutil.copytree(newest(copy), alone)
    text = examined(alone, capsys)[1]
    assert "model.norm.weight is missing" in text
    assert f"{BIAS} is zero for every expert" in text


def test_before_training_zero_biases_are_right(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "copy"))
    reader = TensorReader(newest(copied))
    tensors = reader.read(reader.shapes)
    for name, tensor in tensors.items():
        if "bias" in name:
            tensor.zero_()
    checkpoint.save(copied / CHECKPOINTS, 0, tensors, reader.manifest.extra, None, world_size=2)
    code, text = examined(copied, capsys, "--step", "0")
    assert code == 0, text


def test_a_run_without_a_law_keeps_zero_biases(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose_all(tensors: Tensors) -> None:
        for name in (BIAS, BIAS.replace("layers.2", "layers.1"), "law.bias"):
            tensors[name].zero_()

    save_changed(copy, lose_all)
    assert examined(copy, capsys)[0] == 1
    text = (copy / CONFIG_FILE).read_text()
    (copy / CONFIG_FILE).write_text(text.replace("law: sign", "law: none"))
    assert examined(copy, capsys)[0] == 0


def test_a_law_of_factors_does_not_centre(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_changed(copy, _shift_bias)
    text = (copy / CONFIG_FILE).read_text()
    (copy / CONFIG_FILE).write_text(text.replace("law: sign", "law: multiplicative"))
    assert examined(copy, capsys)[0] == 0


def test_an_import_has_no_optimizer_yet(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = newest(copy)
    reader = TensorReader(path)
    tensors = reader.read(name for name in reader.shapes if name.startswith("model."))
    for imported in (False, True):
        extra = reader.manifest.extra | {"imported": imported}
        checkpoint.save(path.parent, reader.manifest.step, tensors, extra, None)
        assert examined(copy, capsys)[0] == (0 if imported else 1)


def _poison(tensors: Tensors) -> None:
    tensors[EXPERT].view(-1)[5] = float("nan")


def _infinite_moment(tensors: Tensors) -> None:
    tensors[f"optim.exp_avg_sq.{EXPERT.removeprefix('model.')}"].view(-1)[0] = float("inf")


def _twin(tensors: Tensors) -> None:
    tensors[EXPERT] = tensors["model.layers.2.moe.experts.6.down_proj"].clone()


def _lose_bias(tensors: Tensors) -> None:
    tensors[BIAS].zero_()


def _narrow_bias(tensors: Tensors) -> None:
    tensors[BIAS] = tensors[BIAS].bfloat16()


def _shift_bias(tensors: Tensors) -> None:
    tensors[BIAS] += 0.003
    tensors["law.bias"][8:] += 0.003


def _other_law_bias(tensors: Tensors) -> None:
    tensors["law.bias"] = tensors["law.bias"].flip(0)


def _narrow_weight(tensors: Tensors) -> None:
    tensors[EXPERT] = tensors[EXPERT].half()


def _cut_weight(tensors: Tensors) -> None:
    tensors["model.lm_head.weight"] = tensors["model.lm_head.weight"][:-1].clone()


def _lose_weight(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def _strange_weight(tensors: Tensors) -> None:
    tensors["model.layers.7.norm"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (_poison, EXPERT, "has NaN or infinite values: 1 of 128"),
        (_infinite_moment, "optim.exp_avg_sq.layers.1.moe.experts.3.down_proj", "has NaN or infinite values: 1 of 128"),
        (_twin, "", "has the same bytes as model.layers."),
        (_lose_bias, BIAS, "is zero for every expert, in a model whose bias was trained"),
        (_narrow_bias, BIAS, "is bfloat16; a bias must be float32"),
        (_shift_bias, BIAS, "has the mean 0.003; the law keeps it at zero"),
        (_other_law_bias, "law.bias", "is not what the routers have"),
        (_narrow_weight, EXPERT, "is float16 (16, 8), and by the configuration float32 (16, 8)"),
        (_cut_weight, "model.lm_head.weight", "is float32 (256, 16), and by the configuration float32 (257, 16)"),
        (_lose_weight, "model.norm.weight", "is missing"),
        (_strange_weight, "model.layers.7.norm", "is not a tensor of this configuration"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(
    change: Callable[[Tensors], None], tensor: str, problem: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_changed(copy, change)
    code, text = examined(copy, capsys)
    assert code == 1
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert any(tensor in line and problem in line for line in lines), text
    assert re.search(r"damaged: \d errors?", text.splitlines()[-1])


def test_a_missing_expert_is_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "_expert_gaps", lambda _: "")  # which refuses to write such a thing
    save_changed(copy, lambda tensors: tensors.pop(EXPERT))
    monkeypatch.undo()
    code, text = examined(copy, capsys)
    assert code == 1
    assert "model.layers.1.moe.experts.*.down_proj has experts [0, 1, 2, 4, 5, 6, 7], its router has 8" in text


def _truncate(path: Path) -> None:
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(path: Path) -> None:
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _remove(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def _edit_manifest(path: Path) -> None:
    outer = json.loads((path / MANIFEST).read_text())
    outer["manifest"]["step"] = 7
    (path / MANIFEST).write_text(json.dumps(outer))


def _forget_entry(path: Path) -> None:
    index = read_index(path, read_manifest(path).files)
    index.storage_data = {place: info for place, info in index.storage_data.items() if place.fqn != EXPERT}
    (path / INDEX).write_bytes(pickle.dumps(index))
    describe_again(path)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def _code_in_index(path: Path) -> None:
    (path / INDEX).write_bytes(pickle.dumps(_Evil()))
    describe_again(path)


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (_truncate, "__1_0.distcp", "that were written"),
        (_flip, "__0_0.distcp", "has other bytes than were written (sha256 differs)"),
        (_remove, "__0_0.distcp", "is missing"),
        (_edit_manifest, MANIFEST, "was changed after it was written"),
        (_forget_entry, INDEX, f"has entries that are not tensors in this folder: ['{EXPERT}']"),
        (_code_in_index, INDEX, "is not an index of tensors (asks for "),
    ],
)
def test_a_file_that_is_wrong_is_named(
    damage: Callable[[Path], None], file: str, problem: str, copy: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    damage(newest(copy))
    code, text = examined(copy, capsys)
    assert code == 1
    assert any(line.startswith(f"error: {file}") and problem in line for line in text.splitlines()), text
    assert not (copy / "ran").exists()


def test_all_damaged_files_are_named_and_not_the_first_alone(copy: Path, capsys: Any, tmp_path: Path) -> None:
    _truncate(newest(copy))
    _flip(newest(copy))
    code, text = examined(copy, capsys, "--json", str(tmp_path / "out/found.json"))
    found = json.loads((tmp_path / "out/found.json").read_text())["found"]
    assert (code, [each["file"] for each in found]) == (1, ["__0_0.distcp", "__1_0.distcp"])
    assert text.endswith("damaged: 2 errors\n")


def test_a_configuration_of_another_model_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copy / CONFIG_FILE).read_text()
    (copy / CONFIG_FILE).write_text(text.replace("vocab_size: 257", "vocab_size: 300"))
    code, output = examined(copy, capsys)
    assert code == 1
    assert f"{MANIFEST} tells another model than {CONFIG_FILE}: vocab_size (300 there, 257 here)" in output
    assert "model.lm_head.weight is float32 (257, 16), and by the configuration float32 (300, 16)" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a checkpoint (manifest.json), nor a run (config.yaml), nor a directory"),
        (["{newest}", "--step", "5"], "is a checkpoint itself"),
        (["{run}", "--step", "3"], "has no checkpoint of step 3; it has 2, 4, 5"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *(word.format(run=run, newest=newest(run)) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_memory_is_bounded_by_the_largest_tensor_and_not_the_checkpoint(tmp_path: Path) -> None:
    tensors = {f"model.x{number}": torch.randn(2**20) for number in range(32)}  # 4 MiB each, 128 together
    path = checkpoint.save(tmp_path, 1, tensors, {}, None)
    del tensors
    reports: list[CheckpointReport] = []
    peak = peak_resident_bytes(lambda: reports.append(examine_checkpoint(path, lambda *_: None)))
    assert [damage.problem for damage in reports[0].found] == ["does not tell the model, nor does a run"]
    assert peak < 40 * 2**20
