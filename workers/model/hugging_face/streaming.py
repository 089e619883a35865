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

    Names and shapes are those of `trimtab export`, and so are the bytes in the same dtype: experts come one by one,
    under names of their own, but for families whose files have all experts of a layer in one tensor. A tensor is a
    copy, on the device of the model, that nothing else refers to: drop it before you ask for the next one.

    Args:
        model: its experts on any number of ranks, sharded (`parallel.shard`) or not.
        config_file: the config.json of Hugging Face that the model was imported from.
        group: all ranks that hold a part of the model; None for one process.
        dtype: of all tensors but the selection biases, which stay fp32. Or of each by name, as the files had it, where
            a bias stays fp32 if it would be rounded, and a tensor that repeats another comes only if it is named.
        drop_bias: leave out selection biases that have moved, where the family has none.
    Raises:
        InvalidValue: at the call, before any tensor: the model is not that of `config_file` or has adapters, a bias has
            moved that the family does not have, or a tensor has no dtype.

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
        dtypes = {part.file_name: _named(part, dtype) for part in parts}
    else:
        parts = [part for part in parts if not part.is_copy]
        dtypes = {part.file_name: torch.float32 if part.target.endswith(BIAS) else dtype for part in parts}
    return _Source.of(model, live, group).stream(parts, dtypes)


class _Piece(NamedTuple):
    """Rows `first` and following of a tensor of ours, which a rank of the group, `holder`, has under the name `key`."""

    holder: int
    key: str
    first: int
    num_rows: int


@dataclass(frozen=True)
class _Source:
    """Where the tensors lie. live: what this rank holds. wholes, pieces: of all ranks, by name, the same on each."""

    live: Mapping[str, Tensor]
    wholes: Mapping[str, TensorSpec]
    pieces: Mapping[str, list[_Piece]]
    group: dist.ProcessGroup | None
    device: torch.device

    @classmethod
    def of(cls, model: Decoder, live: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> "_Source":
        """Learn who holds what. Of those that hold the same, the first rank sends it. Collective."""
        held = all_gather_specs(live, group)
        specs = {key: spec for of_rank in reversed(held) for key, spec in of_rank.items()}
        pieces: dict[str, list[_Piece]] = {}
        for key, spec in specs.items():
            part = Slice.of_key(key)
            holder = next(rank for rank, of_rank in enumerate(held) if key in of_rank)
            pieces.setdefault(part.name, []).append(_Piece(holder, key, part.first, spec.shape[0]))
        return cls(live, whole_specs(specs), pieces, group, next(model.parameters()).device)

    def stream(self, parts: list[Part], dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
        for name, group in itertools.groupby(parts, lambda part: part.file_name):
            # Not through a variable, which would keep this tensor alive while the next one is made.
            yield name, self._whole(list(group), dtypes[name])

    def _whole(self, parts: list[Part], dtype: torch.dtype) -> Tensor:
        """A tensor of the files: one part, or a stack of them."""
        if not parts[0].num_items:
            return self._gather(parts[0], dtype)
        stack = torch.empty(len(parts), *parts[0].shape, dtype=dtype, device=self.device)
        for item, part in zip(stack, parts, strict=True):
            item.copy_(self._gather(part, dtype))
        return stack

    def _gather(self, part: Part, dtype: torch.dtype) -> Tensor:
        name = f"model.{part.target}"
        # A bias travels in fp32: only its values tell whether a narrower dtype holds it.
        travels_as = torch.float32 if name.endswith(BIAS) else dtype
        tensor = torch.empty(part.our_shape, dtype=travels_as, device=self.device)
        rows = tensor.view(-1, *self.wholes[name].shape[1:])  # theirs may have one more axis, of size 1
        for piece in self.pieces[name]:
            self._send(piece, rows, part.first_row)
        # Head by head: reordering the whole tensor at once would take as much memory again.
        for head in tensor.split(part.head_dim) if part.head_dim else ():
            head.copy_(part.to_theirs(head))
        return stored_as(part.to_theirs(tensor) if part.num_items else tensor, dtype, name)

    def _send(self, piece: _Piece, rows: Tensor, first_row: int) -> None:
        """Fill the part of `rows` that this piece holds. first_row: where `rows` begin in the whole tensor."""
        first = max(piece.first, first_row)
        stop = min(piece.first + piece.num_rows, first_row + len(rows))
        if first >= stop:
            return
        place = rows[first - first_row : stop - first_row]
        if self.group is None or dist.get_rank(self.group) == piece.holder:
            place.copy_(self.live[piece.key][first - piece.first : stop - piece.first])
        if self.group is not None:
            dist.broadcast(place, group=self.group, group_src=piece.holder)


def _family(model: Decoder, config_file: Path) -> Family:
    """The family that config.json says. Raises InvalidValue where the model is another."""
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


def _named(part: Part, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    if part.file_name not in dtypes:
        raise InvalidValue(f"dtype has none for {part.file_name}; name all tensors, or give one dtype for all")
    return dtypes[part.file_name]
