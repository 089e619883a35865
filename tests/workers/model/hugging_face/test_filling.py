"""What a shard gets: every element once, heads in our order, fp8 with its scales."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dispatch.balance import routers_of
from dispatch.exchange.local import LocalDispatcher
from tests.workers.model.families.directories import quantise, write_directory
from tests.workers.model.families.hugging_face import CONFIGS
from workers.checkpoints.state import canonical_state
from workers.model.decoder import Decoder
from workers.model.families import Part
from workers.model.hugging_face import filling as filling_module
from workers.model.hugging_face.filling import fill
from workers.model.hugging_face.source import open_source


def filled(folder: Path) -> tuple[Decoder, dict[str, torch.Tensor]]:
    source = open_source(folder)
    model = Decoder(source.config, lambda: LocalDispatcher(source.config.moe.num_experts))
    state = canonical_state(model)
    for tensor in state.values():
        tensor.fill_(float("nan"))
    fill(state, source)
    return model, state


@pytest.mark.parametrize("name", CONFIGS)
def test_every_element_is_filled_from_one_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_directory(tmp_path / "source", name)
    model, state = filled(folder)
    left = {name for name, tensor in state.items() if not tensor.isfinite().all()}
    biases = {f"model.{router}.expert_bias_E" for router in routers_of(model)}
    source = open_source(folder)
    assert left == (set() if source.family.has_bias else biases)
    sizes = sum(tensor.numel() for key, tensor in state.items() if key not in left)
    assert sum(torch.Size(part.shape).numel() for part in source.parts()) == sizes
    # In blocks of a row or a head, the same.
    monkeypatch.setattr(filling_module, "BLOCK_BYTES", 1)
    for key, tensor in filled(folder)[1].items():
        assert torch.equal(tensor.nan_to_num(), state[key].nan_to_num()), key


def test_halves_of_a_head_become_neighbours_and_halves_again() -> None:
    part = Part("theirs", "ours", (8,), head_dim=4)
    # Two heads of four rows: x0 x1 | y0 y1, where x_j and y_j are turned against each other.
    rows = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])
    ours = part.to_ours(rows)
    assert ours.tolist() == [0, 10, 1, 11, 20, 30, 21, 31]
    assert torch.equal(part.to_theirs(ours), rows)


@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_fp8_is_each_element_times_the_scale_of_its_block(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_directory(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    meant = quantise(folder, block=12)  # does not divide the sizes, and is not a power of two
    monkeypatch.setattr(filling_module, "BLOCK_BYTES", block_bytes)
    _, state = filled(folder)
    source = open_source(folder)
    parts = {part.name: part for part in source.parts()}
    assert len(meant) > 100
    for name, expected in meant.items():
        part = parts[name]
        assert torch.equal(part.rows_of(state[f"model.{part.target}"]), expected), name


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "source", "deepseek_v3", torch.bfloat16)
    quantise(folder, block=12)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is F8_E4M3, which needs {name}_scale_inv"):
        open_source(folder)
