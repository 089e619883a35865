"""Directories of Hugging Face as transformers writes them, with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_layers import MtpModel

from tests.workers.model.families.hugging_face import CONFIGS, VOCAB_SIZE, as_on_the_hub, make_model

PREFIX = "model.layers.3"  # of a MTP layer: after the three layers of the model


def write_directory(folder: Path, name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """A model of CONFIGS in `folder`, saved by transformers; save: arguments of save_pretrained."""
    make_model(name, dtype).save_pretrained(folder, **save)
    for file in folder.glob("*.safetensors") if "text_config" in CONFIGS[name] else ():
        tensors = {as_on_the_hub(key): tensor for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        index.write_text(as_on_the_hub(index.read_text()))
    vocabulary = {"[UNK]": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def mtp_names(mtp: MtpModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the hub: layer 61 at full size."""
    named = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers.0."):
            continue  # the shared embedding and output
        short = name.removeprefix("layers.0.").removeprefix("mtp_block.")
        short = short.replace("post_norm.", "shared_head.norm.") if short.startswith("post_norm") else short
        if short.startswith("mlp.experts."):
            for expert_id, expert in enumerate(tensor):
                base = f"{PREFIX}.mlp.experts.{expert_id}"
                if "down" in short:
                    named[f"{base}.down_proj.weight"] = expert.clone()
                else:
                    gate, up = expert.chunk(2)
                    named |= {f"{base}.gate_proj.weight": gate.clone(), f"{base}.up_proj.weight": up.clone()}
        else:
            named[f"{PREFIX}.{short}"] = tensor.clone()
    return named


def make_mtp(model: Any, dtype: torch.dtype) -> MtpModel:
    torch.manual_seed(3)
    mtp = MtpModel(model, 1).to(dtype)
    mtp.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, tensor in mtp.layers.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, dtype=torch.float32) * 0.2 + ("bias" not in name))
            else:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return mtp


def write_with_mtp(folder: Path, *, copies: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    """As the hub has it: one more layer, and with it copies of embedding and output."""
    write_directory(folder, "deepseek_v3", dtype)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    mtp = make_mtp(make_model("deepseek_v3", dtype), dtype)
    tensors |= mtp_names(mtp, mtp.state_dict())
    if copies:
        tensors[f"{PREFIX}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{PREFIX}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def to_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Store the matrices of a gpt-oss's experts as MXFP4, as the hub does; returns what transformers reads of them."""
    file = folder / "model.safetensors"
    tensors, meant = load_file(file), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        num_experts, num_in, num_out = tensors.pop(name).shape
        grid = (num_experts, num_out, num_in // 32)
        blocks = torch.randint(256, (*grid, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, grid, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
        "quant_method": "mxfp4",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def quantise(folder: Path, block: int) -> dict[str, torch.Tensor]:
    """Store every matrix of the layers as fp8 in blocks; returns what each of them stands for."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    meant = {}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and ".gate." not in name]:
        if "layers" not in name:
            continue
        weight = tensors[name].float()
        rows, columns = weight.shape
        scales = torch.rand(-(-rows // block), -(-columns // block)) * 0.01 + 0.01
        stored = (weight * 50).to(torch.float8_e4m3fn)
        tensors |= {name: stored, f"{name}_scale_inv": scales}
        meant[name] = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                meant[name][row, column] = stored[row, column].float() * scales[row // block, column // block]
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))
    return meant
