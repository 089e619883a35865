"""Directories that are damaged or not supported: the file and the tensor are named, and nothing is half imported."""

import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.cli import main
from tests.workers.model.families.directories import write_directory
from workers.model.hugging_face.source import SourceError, open_source

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
OTHER = "model.layers.1.mlp.experts.5.up_proj.weight"


def file_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def truncate(folder: Path) -> None:
    file = file_of(folder, EXPERT)
    file.write_bytes(file.read_bytes()[:-100])


def break_header(folder: Path) -> None:
    file = file_of(folder, EXPERT)
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def forget_in_index(folder: Path) -> None:
    change_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(EXPERT))


def index_elsewhere(folder: Path) -> None:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    wrong = next(name for name in files if name != file_of(folder, EXPERT).name)
    change_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({EXPERT: wrong}))


def remove_everywhere(folder: Path) -> None:
    change_tensors(file_of(folder, EXPERT), lambda tensors: tensors.pop(EXPERT))
    forget_in_index(folder)


def remove_file(folder: Path) -> None:
    file_of(folder, EXPERT).unlink()


def widen(folder: Path) -> None:
    change_tensors(file_of(folder, EXPERT), lambda tensors: tensors.update({EXPERT: tensors[EXPERT].double()}))


def to_half(folder: Path) -> None:
    set_config(dtype="bfloat16")(folder)
    change_tensors(file_of(folder, EXPERT), lambda tensors: tensors.update({EXPERT: tensors[EXPERT].half()}))


def transpose(folder: Path) -> None:
    change_tensors(file_of(folder, EXPERT), lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.contiguous()}))


def add_tensor(folder: Path) -> None:
    file = file_of(folder, EXPERT)
    change_tensors(
        file, lambda tensors: tensors.update({"model.layers.1.mlp.experts.16.up_proj.weight": torch.ones(2)})
    )
    change_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.layers.1.mlp.experts.16.up_proj.weight": file.name}),
    )


def climb_out(folder: Path) -> None:
    change_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({EXPERT: "../x"}))


def set_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", lambda config: config.update(changes))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("intact"), "deepseek_v3", max_shard_size="60KB")


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "source"
    copy.mkdir()
    for file in intact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-0000\d-of-0000\d\.safetensors is damaged: .*; fetch it again"),
        (break_header, r"\.safetensors is damaged"),
        (forget_in_index, rf"\.safetensors holds {EXPERT}, but model\.safetensors\.index\.json names no file for it"),
        (index_elsewhere, rf"\.safetensors holds {EXPERT}, but .* names model-0000\d"),
        (remove_everywhere, rf"lacks {EXPERT}"),
        (remove_file, r"model-0000\d-of-0000\d\.safetensors cannot be read"),
        (widen, rf"\.safetensors: {EXPERT} is F64; weights must be one of F32, BF16, F16, F8_E4M3"),
        (to_half, rf"\.safetensors: {EXPERT} is F16, and config.json says bfloat16"),
        (transpose, rf"\.safetensors: {EXPERT} is \(32, 16\), and by config.json \(16, 32\)"),
        (add_tensor, r"\.safetensors holds model\.layers\.1\.mlp\.experts\.16\.up_proj\.weight, which a Deepseek"),
        (climb_out, r"index\.json points to '\.\./x'"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (set_config(model_type="llama4"), r"config\.json: model_type 'llama4' .* supported are afmoe, deepseek_v3"),
        (
            set_config(model_type="deepseek_v32", index_topk=2048, index_n_heads=64),
            r"nearest is deepseek_v3, which does not know (?!.*hidden_size).*index_n_heads, index_topk",
        ),
        (set_config(architectures=["XForCausalLM"]), r"architectures \['XForCausalLM'\] is not supported"),
        (set_config(hidden_act="gelu"), r"config\.json: hidden_act is 'gelu', and only 'silu' is supported"),
        (set_config(num_hidden_layers="3"), r"config\.json: num_hidden_layers is '3'; it must be a whole number"),
        (set_config(moe_intermediate_size=None), r"config\.json: moe_intermediate_size is null"),
        (set_config(rope_parameters={"rope_type": "longrope"}), r"rope scaling is 'longrope', and only"),
    ],
)
def test_damage_is_named_before_anything_is_read(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_source(folder)


def test_narrow_weights_are_read_where_config_json_says_fp32(folder: Path) -> None:
    to_half(folder)
    set_config(dtype="float32")(folder)
    assert open_source(folder).tensors[EXPERT].dtype == torch.float16


def import_code(folder: Path, run: Path, *options: str, workers: int = 1) -> int:
    return main(["import", str(folder), str(run), "--workers", str(workers), "--model.max_seq_len", "16", *options])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_nan_is_named_and_nothing_is_half_imported(
    workers: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = EXPERT.replace("experts.3", "experts.13")  # of the second of two processes
    change_tensors(file_of(folder, name), lambda tensors: tensors[name][7].fill_(float("nan")))
    assert import_code(folder, folder.parent / "run", workers=workers) == 2
    message = capsys.readouterr().err
    assert f"{file_of(folder, name)}: {name} holds a NaN or an infinity" in message
    assert [path.name for path in folder.parent.iterdir()] == ["source"]


def test_a_missing_tokenizer_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    assert import_code(folder, folder.parent / "run") == 2
    assert f"{folder / 'tokenizer.json'} is missing" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["source"]


def test_swapped_experts_of_an_export_are_found_by_their_digests(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = folder.parent / "run", folder.parent / "out"
    assert import_code(folder, run) == 0
    assert "note: the imported model is trained on the built-in demo text" in capsys.readouterr().out
    assert main(["export", str(run), str(out)]) == 0
    file = out / "model.safetensors"
    raw = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    header[EXPERT], header[OTHER] = header[OTHER], header[EXPERT]  # of the same shape: nothing else can tell
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + header_bytes :])
    assert import_code(out, folder.parent / "again") == 2
    assert f"{file}: {EXPERT} is not what was exported" in capsys.readouterr().err
    assert not (folder.parent / "again").exists()


def test_other_model_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_code(folder, folder.parent / "run", "--model.moe.top_k", "2") == 2
    assert "only model.max_seq_len, model.recompute and model.lora" in capsys.readouterr().err
    assert import_code(folder, folder.parent / "run", "--model.max_seq_len", "65") == 2
    assert "model.max_seq_len (65) is more than" in capsys.readouterr().err


def test_errors_survive_pickling() -> None:
    import pickle

    assert str(pickle.loads(pickle.dumps(SourceError("file: tensor")))) == "file: tensor"


@pytest.mark.parametrize(("name", "count"), [("num_hidden_layers", 1000), ("n_routed_experts", 10**6)])
def test_more_layers_or_experts_than_the_files_can_hold_are_refused_at_once(
    tmp_path: Path, name: str, count: int
) -> None:
    folder = write_directory(tmp_path / "model", "deepseek_v3")
    change_json(folder / "config.json", lambda values: values.update({name: count}))
    begun = time.process_time()
    with pytest.raises(SourceError, match=r"(1000 layers with|with 1000000 experts).*the files hold"):
        open_source(folder)
    assert time.process_time() - begun < 5


def test_an_import_leaves_the_unfinished_folder_of_another_to_the_same_name_alone(folder: Path) -> None:
    other = folder.parent / ".run.partial"
    other.mkdir()
    (other / "half").touch()
    assert import_code(folder, folder.parent / "run") == 0
    assert (other / "half").exists()


def test_weights_packed_in_4_bits_are_refused_with_the_reason(tmp_path: Path) -> None:
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for name, part in (("deepseek_v3", ()), ("kimi_k25", ("text_config",)), ("kimi_k25", ())):
        folder = write_directory(tmp_path / f"{name} {part}", name)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        (config[part[0]] if part else config)["quantization_config"] = packed
        file.write_text(json.dumps(config))
        message = (
            r"config.json: .*quantization_config: weights are packed .*int4 of Kimi K2.5.*convert them to bf16 first"
        )
        with pytest.raises(SourceError, match=message):
            open_source(folder)


def test_a_file_that_was_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    source = open_source(write_directory(tmp_path, "mixtral"))
    last = max(source.tensors.values(), key=lambda stored: (stored.file, stored.start))
    os.truncate(last.file, last.file.stat().st_size - 1)
    with pytest.raises(SourceError, match=f"ended within {re.escape(last.name)}"):
        last.read()
