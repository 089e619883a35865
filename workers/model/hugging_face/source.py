"""Opens a model directory of Hugging Face, and checks it before any weight is read. Needs the package safetensors."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dispatch.errors import InvalidValue
from workers.model.families import Family, Part, Settings, family_of
from workers.model.families.stacks import item_name, stack_of, with_suffix
from workers.model.hugging_face.mxfp4 import BLOCK as MXFP4_BLOCK
from workers.model.hugging_face.mxfp4 import BLOCKS_SUFFIX, SCALES_SUFFIX
from workers.model.model_config import ModelConfig

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Key in the metadata of a file under which export writes the sha256 of each tensor, and import compares them.
DIGESTS = "sha256"
SCALE_SUFFIX = "_scale_inv"  # ends the name of the scales of a tensor in fp8
MXFP4: Final = "mxfp4"

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,  # of MXFP4
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# A buffer in old checkpoints. It can be computed from config.json.
_IGNORED = ".rotary_emb.inv_freq"


class SourceError(InvalidValue):
    """A directory of Hugging Face that cannot be imported; the message names the file and the tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor are: `start` is the offset in the file. digests: of the file's tensors, by name."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    digests: Mapping[str, str]

    @property
    def sha256(self) -> str | None:
        """The digest of its bytes; None where the file has none."""
        return self.digests.get(self.name)

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor, in the dtype in which it is stored. Its digest is not compared."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return self.read_bytes(file, self.num_bytes).view(self.dtype).view(self.shape)

    def read_bytes(self, file: BufferedReader, num_bytes: int) -> Tensor:
        """The next bytes of `file`, uint8 (num_bytes,). Raises SourceError where the file ends before."""
        data = torch.empty(num_bytes, dtype=torch.uint8)
        if file.readinto(data.numpy().data) != num_bytes:
            raise SourceError(f"{self.file} ended within {self.name}; did it change while it was read?")
        return data

    def items(self, stack: str) -> dict[str, "StoredTensor"]:
        """The items of this stack, one for each expert, by name. stack: the name that the family has for the stack."""
        shape, names = self.shape[1:], [item_name(stack, index) for index in range(self.shape[0])]
        num_bytes = math.prod(shape) * self.dtype.itemsize
        return {
            name: replace(self, name=name, shape=shape, start=self.start + index * num_bytes)
            for index, name in enumerate(names)
        }


@dataclass(frozen=True)
class ModelDirectory:
    """A checked directory of a supported family.

    tensors: by name; instead of a stack of experts it has the items of the stack.
    block: of tensors in fp8, the numbers of rows and columns that share a scale; None without such tensors.
    num_left_out: how many tensors of the files are not in `tensors`, since the family ignores them.
    kept: tensors of another part of the model, such as a vision tower, which an export copies as they are.
    """

    folder: Path
    family: Family
    config: ModelConfig
    settings: Settings
    tensors: Mapping[str, StoredTensor]
    block: tuple[int, int] | None
    num_left_out: int
    kept: Mapping[str, StoredTensor]

    @property
    def num_tensors(self) -> int:
        """How many of the files' tensors are in `tensors`; a stack counts once."""
        return len(set(map(stack_of, self.tensors)))

    def parts(self) -> list[Part]:
        """The parts of the model, by which its tensors are read."""
        return list(self.family.parts(self.config))


def open_source(folder: Path) -> ModelDirectory:
    """Open a directory with config.json and safetensors files, one or several with an index.

    Raises:
        SourceError: a file or a tensor is missing, damaged or unexpected, or has a wrong shape or dtype; names both.
        InvalidValue: the model is not supported, or the package safetensors is missing.
    """
    settings = Settings(read_json(folder / CONFIG), str(folder / CONFIG))
    family = family_of(settings)
    quantisation = _quantisation(settings, family)
    stored = _open_files(folder)
    others = {name: tensor for name, tensor in stored.items() if not name.startswith(family.prefix)}
    language_model = {name: tensor for name, tensor in stored.items() if name not in others}
    tensors = _split_stacks(language_model, family, is_mxfp4=quantisation == MXFP4)
    config = family.read_config(settings)
    block = None if quantisation == MXFP4 else quantisation
    _check_counts(config, len(tensors), folder)
    if not any(name.startswith(f"{family.prefix}model.layers.{config.num_layers}.") for name in tensors):
        config = replace(config, num_mtp_layers=0)  # transformers writes the setting without the layer
    left_out = family.left_out.format(num_layers=config.num_layers)
    used = {name: tensor for name, tensor in tensors.items() if not left_out or not name.startswith(left_out)}
    source = ModelDirectory(folder, family, config, settings, used, block, len(tensors) - len(used), others)
    _check_parts(source)
    return source


def _check_counts(config: ModelConfig, num_tensors: int, folder: Path) -> None:
    """Refuse a config.json of more layers and experts than the files have tensors.

    It may be malicious: to list the names of all its parts could take forever.
    """
    num_moe_layers = max(1, config.num_layers - config.num_dense_layers)
    num_needed = config.num_layers + num_moe_layers * config.moe.num_experts
    if num_needed > num_tensors:
        raise SourceError(
            f"{folder / CONFIG} tells of {config.num_layers} layers with {config.moe.num_experts} experts, and the "
            f"files hold {num_tensors} tensors; fetch the directory again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises SourceError, which names it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path} must hold names and values, not {values!r:.60}")
    return values


def _open_files(folder: Path) -> dict[str, StoredTensor]:
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise SourceError(f"{folder} holds neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles")
        return {tensor.name: tensor for tensor in read_header(folder / SINGLE)}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{folder / INDEX} has no weight_map from tensors to files")
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise SourceError(f"{folder / INDEX} points to {file_name!r:.60}; it must name a file beside it")
        for tensor in read_header(folder / file_name):
            if (indexed := weight_map.get(tensor.name, "no file")) != file_name:
                raise SourceError(f"{tensor.file} holds {tensor.name}, but {INDEX} names {indexed} for it")
            tensors[tensor.name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise SourceError(f"{folder / file_name} lacks {name}, which {INDEX} names it for")
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, after a check that the file is as long as its header says. Raises SourceError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise InvalidValue("import and export need a package: pip install 'trimtab[hf]'") from None
    try:
        with safe_open(path, "pt") as opened:  # checks that the tensors cover the file, without gaps or overlaps
            metadata = opened.metadata() or {}
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        digests = json.loads(metadata.get(DIGESTS, "{}"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise SourceError(f"{path} is damaged: {error}; fetch it again") from error
    header.pop("__metadata__", None)
    return [
        _stored(path, name, entry, 8 + header_bytes, digests)
        for name, entry in header.items()
        if not name.endswith(_IGNORED)
    ]


def _stored(
    path: Path, name: str, entry: Mapping[str, Any], data_start: int, digests: Mapping[str, str]
) -> StoredTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise SourceError(f"{path}: {name} is {entry['dtype']}; weights must be one of {', '.join(_DTYPES)}")
    return StoredTensor(name, path, dtype, tuple(entry["shape"]), data_start + entry["data_offsets"][0], digests)


def _split_stacks(tensors: Mapping[str, StoredTensor], family: Family, *, is_mxfp4: bool) -> dict[str, StoredTensor]:
    """The tensors by name, each stack of experts replaced by its items.

    In MXFP4 a tensor of blocks gets the name of the weight that it encodes.
    """
    split: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        stack = name.removesuffix(BLOCKS_SUFFIX) if is_mxfp4 else name
        if stack != name and stack in tensors:
            raise SourceError(f"{tensor.file} holds {name}, and {tensors[stack].file} holds {stack}: one is too many")
        split |= tensor.items(stack) if family.is_stack(name) and tensor.shape else {name: tensor}
    return split


def _quantisation(settings: Settings, family: Family) -> tuple[int, int] | Literal["mxfp4"] | None:
    """How weights are stored by config.json: fp8 (the rows and columns that share a scale), MXFP4, or neither."""
    # Where the language model is a part of the model, the setting may be among those of that part.
    if family.prefix and settings.values.get("quantization_config") is None:
        settings = settings.inner("text_config")
    if settings.values.get("quantization_config") is None:
        return None
    inner = settings.inner("quantization_config")
    quantization = inner.values
    if quantization.get("quant_method") == "compressed-tensors":
        raise SourceError(
            f"{inner.where}: weights are packed (quant_method 'compressed-tensors', as the int4 of Kimi K2.5), which "
            "import does not unpack; convert them to bf16 first"
        )
    if family.moe_parts.has_stacks:
        inner.expect("quant_method", MXFP4)
        return MXFP4
    inner.expect("quant_method", "fp8")
    inner.expect("fmt", "e4m3", "float8_e4m3fn")
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise SourceError(f"{inner.where}: weight_block_size is {block!r:.60}; it must be two whole numbers above 0")
    return block[0], block[1]


def _check_parts(source: ModelDirectory) -> None:
    parts = source.parts()
    scales = {name for name in source.tensors if stack_of(name).endswith((SCALE_SUFFIX, SCALES_SUFFIX))}
    unexpected = sorted(source.tensors.keys() - {part.name for part in parts} - scales)
    if unexpected:
        where = source.tensors[unexpected[0]].file
        raise SourceError(
            f"{where} holds {unexpected[0]}, which a {source.family.architecture} of its config.json does not have"
        )
    for part in parts:
        tensor = source.tensors.get(part.name)
        if tensor is None and part.is_copy:
            continue
        if tensor is None:
            raise SourceError(f"{source.folder} lacks {part.name}: neither an index entry nor a file has it")
        if tensor.dtype == torch.uint8:
            _check_mxfp4(source, tensor, part)
            continue
        if tensor.shape != part.shape:
            raise SourceError(f"{tensor.file}: {part.name} is {tensor.shape}, and by config.json {part.shape}")
        _check_dtype(source, tensor, _allowed_dtypes(source))


def _check_mxfp4(source: ModelDirectory, tensor: StoredTensor, part: Part) -> None:
    scales = source.tensors.get(with_suffix(tensor.name, SCALES_SUFFIX))
    if not part.is_transposed or scales is None or part.shape[0] % MXFP4_BLOCK:
        raise SourceError(
            f"{tensor.file}: {tensor.name} is U8, which only matrices of experts are, in blocks of {MXFP4_BLOCK} with "
            f"{SCALES_SUFFIX} beside them and quant_method {MXFP4!r} in config.json"
        )
    grid = (part.shape[1], part.shape[0] // MXFP4_BLOCK)
    if (tensor.shape, scales.shape, scales.dtype) != ((*grid, MXFP4_BLOCK // 2), grid, torch.uint8):
        raise SourceError(
            f"{tensor.file}: {tensor.name} in MXFP4 has blocks {tensor.shape} and scales {scales.shape}, and by "
            f"config.json {(*grid, MXFP4_BLOCK // 2)} and {grid} of U8"
        )


def _allowed_dtypes(source: ModelDirectory) -> Iterable[torch.dtype]:
    """The dtype in config.json, and fp32, in which files may keep some tensors.

    Any dtype where config.json says fp32, which represents the values of all others, or says nothing.
    """
    name = source.settings.values.get("dtype") or source.settings.values.get("torch_dtype")
    wanted = getattr(torch, str(name), None)
    if not isinstance(wanted, torch.dtype) or wanted == torch.float32:
        return tuple(_DTYPES.values())
    return wanted, torch.float32


def _check_dtype(source: ModelDirectory, tensor: StoredTensor, allowed: Iterable[torch.dtype]) -> None:
    if tensor.dtype == torch.float8_e4m3fn:
        scale = source.tensors.get(tensor.name + SCALE_SUFFIX)
        if source.block is None or scale is None or len(tensor.shape) != 2:
            raise SourceError(
                f"{tensor.file}: {tensor.name} is F8_E4M3, which needs {tensor.name}{SCALE_SUFFIX} beside it and "
                "quantization_config in config.json"
            )
        grid = tuple(-(-size // block) for size, block in zip(tensor.shape, source.block, strict=True))
        if scale.shape != grid or scale.dtype != torch.float32:
            raise SourceError(f"{scale.file}: {scale.name} is {scale.dtype} {scale.shape}; it must be float32 {grid}")
    elif tensor.dtype not in allowed:
        raise SourceError(
            f"{tensor.file}: {tensor.name} is {DTYPE_NAMES[tensor.dtype]}, and config.json says "
            f"{source.settings.values.get('dtype') or source.settings.values.get('torch_dtype')}"
        )
