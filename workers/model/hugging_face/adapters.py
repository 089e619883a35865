"""Exports the adapters of a checkpoint: added to their weights (`MergedReader`), or as files of PEFT."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dispatch.errors import InvalidValue
from workers.checkpoints.tensor_reader import TensorReader
from workers.model.families.base import Family, Part
from workers.model.lora import LoraConfig, adapter_names
from workers.model.model_config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class MergedReader(TensorReader):
    """Reads a checkpoint as if its model had no adapters: the product of each adapter is added to its matrix, in fp32.

    Args:
        path: folder of the checkpoint.
        config: of its model.
    Raises:
        CheckpointCorrupt: as of TensorReader.
    """

    def __init__(self, path: Path, config: LoraConfig) -> None:
        super().__init__(path)
        self._scale = config.scale

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As of TensorReader."""
        tensors = super().read(names)
        for name, tensor in tensors.items():
            pair = adapter_names(name)
            if pair[0] in self.shapes:
                lora_a, lora_b = super().read(pair).values()
                tensor.addmm_(lora_b, lora_a, alpha=self._scale)
        return tensors


def write_adapter(folder: Path, family: Family, config: ModelConfig, reader: TensorReader) -> None:
    """Write adapters into `folder` as PEFT reads them for the family's model in transformers 5, in fp32.

    In transformers the experts of a layer are two parameters, gate_up_proj and down_proj, which hold all experts. PEFT
    has one adapter for each.
    """
    from safetensors.torch import save_file

    if family.prefix:
        raise InvalidValue(
            f"adapters of {family.architecture}, whose language model is a part of another model, cannot be written by "
            "themselves; give --merged"
        )
    adapted = [
        replace(part, name=_module_name(part.name, family))
        for part in family.parts(config)
        if adapter_names(f"model.{part.target}")[0] in reader.shapes
    ]
    expert_parts = [part for part in adapted if ".experts." in part.target]
    linear_parts = [part for part in adapted if ".experts." not in part.target]
    tensors = {**dict(_linear_adapters(linear_parts, reader)), **dict(_expert_adapters(expert_parts, reader))}
    modules, parameters = _targets(linear_parts, expert_parts)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _module_name(name: str, family: Family) -> str:
    """The name in transformers 5 of the tensor that has this name in the files."""
    return ".".join(family.modules.get(word, word) for word in name.split("."))


def _targets(linear_parts: Iterable[Part], expert_parts: Iterable[Part]) -> tuple[list[str], list[str]]:
    """PEFT's target_modules and target_parameters: the ends of the names that have adapters.

    PEFT 0.21 takes any module gate_proj, up_proj or down_proj for that of an expert (its `_convert_peft_config_moe`):
    such modules are named by their weights, among target_parameters.
    """
    modules, parameters = set(), set()
    for part in linear_parts:
        within_layer = part.name.split(".", 3)[3]  # model.layers.N.
        module = within_layer.removesuffix(".weight")
        if module.endswith((".gate_proj", ".up_proj", ".down_proj")):
            parameters.add(within_layer)
        else:
            modules.add(module)
    parameters |= {f"mlp.experts.{part.target.rpartition('.')[2]}" for part in expert_parts}
    return sorted(modules), sorted(parameters)


def _linear_adapters(parts: Iterable[Part], reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """A and B of each of their matrices; matrices that we pack in one parameter have the same A."""
    for part in parts:
        lora_a, lora_b = reader.read(adapter_names(f"model.{part.target}")).values()
        name = f"base_model.model.{part.name.removesuffix('.weight')}"
        yield f"{name}.lora_A.weight", lora_a
        yield f"{name}.lora_B.weight", part.to_theirs(part.rows_of(lora_b)).clone()


def _expert_adapters(parts: Iterable[Part], reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """For all experts of a layer, A (experts x rank, in) and B (out, rank x experts), where the expert varies fastest.

    PEFT wraps the two parameters of the module one after the other, gate_up_proj first: hence `.base_layer`.
    """
    targets_by_stack: dict[str, dict[str, None]] = {}  # our names in the order of the experts, once each
    for part in parts:
        layer, kind = part.name.split(".")[2], part.target.rpartition(".")[2]
        inner = ".base_layer" if kind == "gate_up_proj" else ""
        stack = f"base_model.model.model.layers.{layer}.mlp.experts{inner}"
        targets_by_stack.setdefault(stack, {})[f"model.{part.target}"] = None
    for name, targets in targets_by_stack.items():
        pairs = [reader.read(adapter_names(target)).values() for target in targets]
        all_a, all_b = zip(*pairs, strict=True)
        yield f"{name}.lora_A.weight", torch.cat(all_a)
        yield f"{name}.lora_B.weight", torch.stack(all_b, dim=2).flatten(1)
