"""MXFP4 against its definition, bit by bit, and against transformers; and directories of it that are damaged."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.workers.model.families.directories import to_mxfp4, write_directory
from tests.workers.model.hugging_face.test_filling import filled
from workers.model.hugging_face.mxfp4 import dequantise
from workers.model.hugging_face.source import SourceError, open_source

STACK = "model.layers.1.mlp.experts.down_proj"


def number_of(code: int) -> float:
    """Of 4 bits: a sign, two of an exponent with bias 1, and one of a fraction (E2M1 of OCP MX 1.0)."""
    sign, exponent, fraction = (-1.0) ** (code >> 3), (code >> 1) & 3, code & 1
    return sign * (fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2 ** (exponent - 1))


def test_every_byte_under_every_scale_is_what_its_bits_say() -> None:
    scales = torch.arange(255, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).expand(-1, 255, -1)
    numbers = dequantise(blocks, scales.expand(16, -1)).view(16, 255, 32)
    for byte in range(256):
        for half, code in ((0, byte & 15), (1, byte >> 4)):
            expected = [number_of(code) * 2.0 ** (scale - 127) for scale in range(255)]
            got = numbers[byte // 16, :, 2 * (byte % 16) + half].tolist()
            # 2^-127 and half of it are below the normal numbers of fp32, and 6 * 2^127 beyond its largest.
            assert got[2:252] == expected[2:252], (byte, half)
            assert math.copysign(1, got[127]) == math.copysign(1, expected[127])
    assert dequantise(blocks[:, :1], torch.full((16, 1), 255)).isnan().all()


def test_numbers_are_those_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)  # bf16, (experts, in, out)
    assert torch.equal(dequantise(blocks, scales), theirs.transpose(1, 2).float())


def test_a_shard_gets_what_transformers_reads(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "source", "gpt_oss", torch.bfloat16)
    meant = to_mxfp4(folder)
    _, state = filled(folder)
    parts = {part.name: part for part in open_source(folder).parts()}
    assert len(meant) == 6
    for stack, whole in meant.items():
        for index, expected in enumerate(whole.float()):
            part = parts[f"{stack}[{index}]"]
            assert torch.equal(state[f"model.{part.target}"], part.to_ours(expected)), part.name


def no_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{STACK}_scales"]


def a_block_too_few(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STACK}_blocks"] = tensors[f"{STACK}_blocks"][..., :15].contiguous()


def an_expert_too_few(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STACK}_blocks"] = tensors[f"{STACK}_blocks"][:7].contiguous()


def both(tensors: dict[str, Tensor]) -> None:
    tensors[STACK] = torch.zeros(8, 32, 32, dtype=torch.bfloat16)


def a_bias_in_bytes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STACK}_bias"] = tensors[f"{STACK}_bias"].to(torch.uint8)


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STACK}_scales"][3, 0, 0] = 255


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_scales, r"down_proj\[0\] is U8, which only matrices of experts are, in blocks of 32 with _scales"),
        (a_block_too_few, r"down_proj\[0\] in MXFP4 has blocks \(32, 1, 15\) and scales \(32, 1\), and by .* 16\)"),
        (an_expert_too_few, r"lacks model.layers.1.mlp.experts.down_proj\[7\]"),
        (both, r"holds .*down_proj_blocks, and .* holds .*down_proj: one is too many"),
        (a_bias_in_bytes, r"down_proj_bias\[0\] is U8, which only matrices of experts are"),
        (not_a_number, r"down_proj\[3\] holds a NaN or an infinity"),
    ],
)
def test_what_is_damaged_is_refused_by_name(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    folder = write_directory(tmp_path / "source", "gpt_oss", torch.bfloat16)
    to_mxfp4(folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=message):
        filled(folder)


def test_it_needs_the_word_of_config_json(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "source", "gpt_oss", torch.bfloat16)
    to_mxfp4(folder)
    config = json.loads((folder / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"holds model.*_blocks\[0\], which a GptOssForCausalLM .* does not have"):
        open_source(folder)
    config["quantization_config"] = quantisation | {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quant_method is 'fp8', and only 'mxfp4' is supported"):
        open_source(folder)
