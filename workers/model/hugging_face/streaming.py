"""Streams the weights of a live model to all ranks under the names of Hugging Face, one tensor at a time.

For whoever needs the weights while training goes on, such as the inference engine of a RL trainer: no file is written,
and no rank ever holds the whole model.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.errors import InvalidValue
from workers.checkpoints.shares import TensorSpec, all_gather_specs
from workers.checkpoints.slices import Slice, whole_specs
from workers.checkpoints.state import canonical_state
from workers.model.decoder import Decoder
from workers.model.families import Family, Part, Settings, family_of
from workers.model.hugging_face.source import read_json
from workers.model.hugging_face.writing import BIAS, stored_as


def stream_weights(
    model: Decoder,
    config_file: Path | str,
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.bfloat16,
    drop_bias: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a live model as (name in Hugging Face, tensor), on every rank, one in memory at a time.

    Names, shapes and, in the same dtype, bytes are those that `trimtab export` writes: each expert is one tensor, but
    for families whose files have all experts of a layer in one. A tensor is a copy on the device of the model, to which
    nothing else refers: drop it before you ask for the next one.

    Args:
        model: its experts on any number of ranks, sharded (`parallel.shard`) or not.
        config_file: the config.json of Hugging Face that the model was imported from.
        group: all ranks that hold a part of the model; None for one process.
        dtype: of all tensors but the selection biases, which stay fp32. Or the dtype of each tensor by its name: then a
            bias stays fp32 only if the cast would round it, and a tensor that repeats another comes only if it is
            named.
        drop_bias: leave out selection biases that are not zero, where the family has none; otherwise they are refused.
    Raises:
        InvalidValue: at the call, before any tensor: the model is not that of `config_file` or has adapters, a bias is
            not zero that the family does not have, or a tensor has no dtype.

    Collective: every rank of `group` must call it and ask for every tensor, between two steps. Each tensor travels when
    it is asked for, so that a rank that stops early leaves the others waiting.
    """
    family = _family(model, Path(config_file))
    live = {name: part for name, part in canonical_state(model).items() if name.startswith("model.")}
    if model.config.lora.rank:
        raise InvalidValue(
            f"this model has adapters (model.lora.rank {model.config.lora.rank}), which no name of Hugging Face holds; "
            "`trimtab export --merged` writes weights that have them added"
        )
    if not family.has_bias and not drop_bias:
        _check_biases(live, family)
    parts = list(family.parts(model.config))
    if isinstance(dtype, Mapping):
        parts = [part for part in parts if part.file_name in dtype or not part.is_copy]
        dtypes = {part.file_name: _named_dtype(part, dtype) for part in parts}
    else:
        parts = [part for part in parts if not part.is_copy]
        dtypes = {part.file_name: torch.float32 if part.target.endswith(BIAS) else dtype for part in parts}
    return _Sharded.gather(model, live, group).stream(parts, dtypes)


class _Piece(NamedTuple):
    """Rows of one of our tensors, from `first` on: the rank `holder` of the group has them under the name `key`."""

    holder: int
    key: str
    first: int
    num_rows: int


@dataclass(frozen=True)
class _Sharded:
    """Our tensors, spread over the ranks of a group.

    live: what this rank holds, by key (workers.checkpoints.slices). specs, pieces: shape and dtype of each whole tensor
        and where its rows are, by name, the same on all ranks.
    """

    live: Mapping[str, Tensor]
    specs: Mapping[str, TensorSpec]
    pieces: Mapping[str, list[_Piece]]
    group: dist.ProcessGroup | None
    device: torch.device

    @classmethod
    def gather(cls, model: Decoder, live: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> "_Sharded":
        """Gather which rank holds what. The first of the ranks that hold the same is its `holder`. Collective."""
        specs_by_rank = all_gather_specs(live, group)
        specs = {key: spec for rank_specs in reversed(specs_by_rank) for key, spec in rank_specs.items()}
        pieces: dict[str, list[_Piece]] = {}
        for key, spec in specs.items():
            part = Slice.of_key(key)
            holder = next(rank for rank, rank_specs in enumerate(specs_by_rank) if key in rank_specs)
            pieces.setdefault(part.name, []).append(_Piece(holder, key, part.first, spec.shape[0]))
        return cls(live, whole_specs(specs), pieces, group, next(model.parameters()).device)

    def stream(self, parts: list[Part], dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
        for name, group in itertools.groupby(parts, lambda part: part.file_name):
            # Not through a variable, which would keep this tensor alive while the next one is made.
            yield name, self._file_tensor(list(group), dtypes[name])

    def _file_tensor(self, parts: list[Part], dtype: torch.dtype) -> Tensor:
        """A tensor of the files: one part, or a stack of them."""
        if not parts[0].num_items:
            return self._gather(parts[0], dtype)
        stack = torch.empty(len(parts), *parts[0].shape, dtype=dtype, device=self.device)
        for item, part in zip(stack, parts, strict=True):
            item.copy_(self._gather(part, dtype))
        return stack

    def _gather(self, part: Part, dtype: torch.dtype) -> Tensor:
        name = f"model.{part.target}"
        # A bias is sent in fp32: only its values tell whether a narrower dtype holds it.
        wire_dtype = torch.float32 if name.endswith(BIAS) else dtype
        tensor = torch.empty(part.our_shape, dtype=wire_dtype, device=self.device)
        rows = tensor.view(-1, *self.specs[name].shape[1:])  # theirs may have one more axis, of size 1
        for piece in self.pieces[name]:
            self._broadcast(piece, rows, part.first_row)
        # Head by head: reordering the whole tensor at once would take as much memory again.
        for head in tensor.split(part.head_dim) if part.head_dim else ():
            head.copy_(part.to_theirs(head))
        return stored_as(part.to_theirs(tensor) if part.num_items else tensor, dtype, name)

    def _broadcast(self, piece: _Piece, rows: Tensor, first_row: int) -> None:
        """Fill the part of `rows` that this piece holds. first_row: where `rows` begin in the whole tensor."""
        first = max(piece.first, first_row)
        stop = min(piece.first + piece.num_rows, first_row + len(rows))
        if first >= stop:
            return
        piece_rows = rows[first - first_row : stop - first_row]
        if self.group is None or dist.get_rank(self.group) == piece.holder:
            piece_rows.copy_(self.live[piece.key][first - piece.first : stop - piece.first])
        if self.group is not None:
            dist.broadcast(piece_rows, group=self.group, group_src=piece.holder)


def _family(model: Decoder, config_file: Path) -> Family:
    """The family of a config.json. Raises InvalidValue where it is not the config.json of this model."""
    settings = Settings(read_json(config_file), str(config_file))
    family, ours = family_of(settings), model.config
    free = {name: getattr(ours, name) for name in ("max_seq_len", "recompute", "num_mtp_layers", "lora")}
    if replace(family.read_config(settings), **free) != ours:
        raise InvalidValue(
            f"{config_file} is not of this model: its {family.architecture} has other settings; give the config.json "
            "that the model was imported from"
        )
    return family


def _check_biases(live: Mapping[str, Tensor], family: Family) -> None:
    moved = [name for name, tensor in live.items() if name.endswith(BIAS) and bool(tensor.any())]
    if moved:
        raise InvalidValue(
            f"{len(moved)} routers have a selection bias, the first is {moved[0]}, and {family.architecture} has none: "
            "without it tokens go to other experts; train with the law 'none', or give drop_bias=True to stream all "
            "the same"
        )


def _named_dtype(part: Part, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    if part.file_name not in dtypes:
        raise InvalidValue(f"dtype has none for {part.file_name}; name all tensors, or give one dtype for all")
    return dtypes[part.file_name]
