"""Save and load the state of a gang as one checkpoint that any number of ranks can read.

Tensors are stored in the format of torch.distributed.checkpoint (DCP): a tensor that several ranks hold is written
once, by the rank that has the fewest bytes to write so far. A checkpoint is complete or it is not there: it is written
under another name, verified, and then renamed.
"""

import errno
import functools
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dispatch.values import all_gather_values
from workers.checkpoints.checkpoint_files import (
    INDEX,
    CheckpointCorrupt,
    CheckpointError,
    DiskRefused,
    Manifest,
    check_file,
    checkpoint_path,
    digest,
    discard,
    list_checkpoints,
    read_manifest,
    step_of,
    sync_folder,
    write_manifest,
)
from workers.checkpoints.dcp import Piece, WrittenShare, read_tensors, write_index, write_share
from workers.checkpoints.index import read_index
from workers.checkpoints.shares import TensorSpec, all_gather_specs, divide
from workers.checkpoints.slices import whole_specs
from workers.checkpoints.state import missing_experts
from workers.distributed import agreement

Group = dist.ProcessGroup | None
T = TypeVar("T")

# What torch.save adds to one tensor (1.6 KB), and its entry in the index.
_OVERHEAD_BYTES = 4096

# Errors after which the same write may succeed later: when somebody has made room, or has mended the disk.
_RETRYABLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EFBIG}
)
_KINDS = {kind.__name__: kind for kind in (CheckpointError, DiskRefused, CheckpointCorrupt)}


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Any],
    group: Group,
    keep: int = 3,
    world_size: int | None = None,
    make_room: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint of `step` into `root` and return its folder.

    Args:
        root: the checkpoints folder of the run, the same for all ranks and seen by all their machines. It is made here,
            its parent is not.
        tensors: what this rank holds, by canonical name (see workers.checkpoints.state). Tensors of the same name on
            several ranks must be equal: one of them is written.
        extra: JSON values, the same on all ranks; those of rank 0 are written.
        group: gloo group of all ranks; None for a process on its own.
        keep: complete checkpoints that stay, this one included. Later steps than `step` are left alone.
        world_size: of the run that had this state, where it differs from that of `group`. `load` reads the states of
            random generators only on as many ranks.
        make_room: called on rank 0 before anything is written, if space is missing, with the number of missing bytes.

    Raises:
        DiskRefused: on all ranks, where the disk is full or fails.
        CheckpointError: on all ranks, with the cause. What was written is removed, earlier checkpoints are untouched.

    Collective. Waits for the disk. A checkpoint of the same step is replaced.
    """
    if keep < 1:
        raise ValueError(f"keep ({keep}) must be at least 1: the checkpoint that was just written stays")
    final = checkpoint_path(root, step)
    rank, num_ranks = _rank_and_size(group)
    # The name is random: a save of an earlier gang that failed may still run somewhere and remove its own leftovers.
    partial = final.with_name(f".{final.name}.{_shared_random_name(group)}.partial")
    held = all_gather_specs(tensors, group)
    specs = _merge(held)
    if gaps := _expert_gaps(specs):
        raise CheckpointError(f"refused to save a model without all of its experts: {gaps}")
    _together(group, f"preparing {partial}", lambda: _prepare(root, partial, specs, make_room) if rank == 0 else None)
    try:
        mine = {name: tensors[name] for name in divide(held)[rank]}
        written = _together(group, f"writing {partial}", lambda: write_share(partial, mine, rank))
        shares = all_gather_values(written, group, _read_written)
        files = {name: entry for share in shares for name, entry in share.files.items()}
        manifest = Manifest(step=step, world_size=world_size or num_ranks, files=files, extra=dict(extra))
        pieces = [piece for share in shares for piece in share.pieces]
        finish = functools.partial(_finish, partial, final, manifest, specs, pieces)
        _together(group, f"finishing {final}", lambda: finish() if rank == 0 else None)
    except BaseException:  # also Ctrl-C and a dead peer: earlier checkpoints must not lack the space
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0:
        _prune(root, step, keep)
    return final


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    group: Group,
    *,
    sections: tuple[str, ...] = ("model", "optim", "law"),
) -> dict[str, Any]:
    """Read a checkpoint into `tensors` in place and return its extra values.

    Nothing is written into `tensors` before every file, name, shape and dtype was checked. Experts and rows may be
    divided over the ranks in another way than when they were saved. Random generator states are read only where there
    are as many ranks as saved them; otherwise those in `tensors` stay as they are.

    Args:
        path: a folder of `list_checkpoints`.
        tensors: what this rank needs, by canonical name.
        group: gloo group of all ranks; None for a process on its own.
        sections: sections (see workers.checkpoints.state) of which no saved tensor may be missing in `tensors`. With
            ("model",) a model is read without its optimizer.

    Raises:
        CheckpointCorrupt: the checkpoint is damaged; `previous` and the message name the newest intact one before it.
        CheckpointError: it has other tensors than `tensors` asks for.

    Collective; errors are the same on all ranks.
    """
    manifest, index = _open_or_offer_previous(path, group)
    saved = _specs_of_index(index)
    same_ranks = manifest.world_size == _rank_and_size(group)[1]
    mine = {name: t for name, t in tensors.items() if _section(name) != "random" or (same_ranks and name in saved)}
    _check_fit(path, saved, _merge(all_gather_specs(mine, group)), sections)
    _together(group, f"reading {path}", lambda: read_tensors(path, index, mine))
    return manifest.extra


def verify(path: Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest. Raises CheckpointCorrupt as `load`."""
    return _open_or_offer_previous(path, None)[0]


def _open_or_offer_previous(path: Path, group: Group) -> tuple[Manifest, Metadata]:
    try:
        return _open(path, group)
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(path, error.file, error.reason, _previous_intact(path, group)) from error


def _open(path: Path, group: Group) -> tuple[Manifest, Metadata]:
    """Check all that can be checked without loading tensors. The ranks divide the hashing of the files among them."""
    rank, world_size = _rank_and_size(group)

    def check_share() -> Manifest:
        if not path.is_dir():
            steps = ", ".join(str(step_of(other)) for other in list_checkpoints(path.parent)) or "none"
            raise CheckpointError(f"there is no checkpoint {path}; steps that are there: {steps}")
        manifest = read_manifest(path)
        for name, (size, sha256) in sorted(manifest.files.items())[rank::world_size]:
            check_file(path, name, size, sha256)
        return manifest

    manifest = _together(group, f"verifying {path}", check_share)
    index = _together(group, f"reading {path}", lambda: read_index(path, manifest.files))
    if gaps := _expert_gaps(_specs_of_index(index)):
        raise CheckpointCorrupt(path, INDEX, f"lacks experts: {gaps}")
    return manifest, index


def _previous_intact(path: Path, group: Group) -> Path | None:
    for earlier in reversed(list_checkpoints(path.parent)):
        if step_of(earlier) < step_of(path):
            try:
                _open(earlier, group)
            except CheckpointError:
                continue
            return earlier
    return None


def _prepare(
    root: Path, partial: Path, specs: Mapping[str, TensorSpec], make_room: Callable[[int], None] | None
) -> None:
    root.mkdir(exist_ok=True)  # without parents: a run directory that was moved away must not come back empty
    for leftover in root.glob(".step_*"):  # of a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    needed = sum(spec.num_bytes + _OVERHEAD_BYTES for spec in specs.values())
    free = shutil.disk_usage(root).free
    if free < needed and make_room is not None:
        make_room(needed - free)
        free = shutil.disk_usage(root).free
    if free < needed:
        raise DiskRefused(
            f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free in {root}; free some space, keep "
            "fewer checkpoints or choose another run directory"
        )
    partial.mkdir()


def _finish(
    partial: Path, final: Path, manifest: Manifest, specs: Mapping[str, TensorSpec], pieces: Sequence[Piece]
) -> None:
    """Check the files that all ranks wrote, write index and manifest, and rename the folder. On rank 0 alone."""
    unseen = [name for name, (size, _) in manifest.files.items() if _size(partial / name) != size]
    if unseen:
        raise CheckpointError(
            f"{len(unseen)} files are not in {partial} as the ranks wrote them, the first is {unseen[0]}; "
            "do all machines see this folder?"
        )
    write_index(partial, specs, pieces)
    manifest = replace(manifest, files={**manifest.files, INDEX: digest(partial / INDEX)})
    written = _specs_of_index(read_index(partial, manifest.files, is_trusted=True))
    if written != specs:
        wrong = sorted(name for name in written.keys() | specs.keys() if written.get(name) != specs.get(name))
        raise CheckpointError(f"{len(wrong)} tensors are not in {partial} as the ranks had them, such as {wrong[0]}")
    write_manifest(partial, manifest)
    if final.exists():
        discard(final)
    partial.rename(final)
    sync_folder(final.parent)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _prune(root: Path, step: int, keep: int) -> None:
    # Only checkpoints up to this step: after a resume from an earlier step, later ones belong to the history that the
    # run left, and must not count as the newest.
    for path in [path for path in list_checkpoints(root) if step_of(path) <= step][:-keep]:
        try:
            discard(path)
        except OSError as error:
            warnings.warn(f"could not remove the old checkpoint {path}: {error}", stacklevel=3)


def _check_fit(
    path: Path, saved: Mapping[str, TensorSpec], needed: Mapping[str, TensorSpec], sections: tuple[str, ...]
) -> None:
    missing = sorted(needed.keys() - saved.keys())
    unexpected = sorted(name for name in saved.keys() - needed.keys() if _section(name) in sections)
    # A dtype that differs is an error, not a cast: a bias read as bf16 no longer moves (Megatron-LM #1482).
    differing = [name for name in sorted(needed.keys() & saved.keys()) if needed[name] != saved[name]]
    problems = [f"{len(missing)} tensors are not in it, such as {missing[0]}"] if missing else []
    if unexpected:
        problems.append(f"{len(unexpected)} tensors in it have no place here, such as {unexpected[0]}")
    if differing:
        name = differing[0]
        problems.append(f"{len(differing)} tensors differ, such as {name}: {saved[name]} in it, {needed[name]} here")
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is not of this model: {'; '.join(problems)}; use the configuration it was trained with"
        )


def _specs_of_index(index: Metadata) -> dict[str, TensorSpec]:
    # read_index has refused entries that are not tensors.
    entries: Mapping[str, Any] = index.state_dict_metadata
    return {name: TensorSpec(tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()}


def _merge(specs_by_rank: list[dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """The shapes of whole tensors, from what each rank holds. Raises CheckpointError where the ranks do not agree.

    DCP does not check: it would keep one of two tensors of the same name, whatever they are.
    """
    merged: dict[str, TensorSpec] = {}
    for rank, specs in enumerate(specs_by_rank):
        for name, spec in specs.items():
            if merged.setdefault(name, spec) != spec:
                raise CheckpointError(f"{name} is {spec} on rank {rank} and {merged[name]} on a rank before it")
    try:
        return whole_specs(merged)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _expert_gaps(specs: Mapping[str, TensorSpec]) -> str:
    return "; ".join(missing_experts({name: spec.shape for name, spec in specs.items()})[:3])


def _section(name: str) -> str:
    return name.partition(".")[0]


def _rank_and_size(group: Group) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _shared_random_name(group: Group) -> str:
    """A random name, the same on all ranks. Collective."""
    return all_gather_values(secrets.token_hex(4), group, str)[0]


def _read_written(value: Any) -> WrittenShare:
    pieces, files = value
    if any(list(map(type, piece)) != [str, str, int, int] for piece in pieces):
        raise TypeError("pieces of tensors are expected")
    if any((type(size), type(sha256)) != (int, str) for size, sha256 in files.values()):
        raise TypeError("size and sha256 of files are expected")
    return WrittenShare(
        [tuple(piece) for piece in pieces], {name: (size, sha256) for name, (size, sha256) in files.items()}
    )


def _together(group: Group, doing: str, work: Callable[[], T]) -> T:
    """Run `work`, which is not collective. If it fails on any rank, raise the same CheckpointError on all. Collective.

    A bug is raised as it is on the rank that hit it, and as PeerFailed on the others.
    """
    rank = _rank_and_size(group)[0]

    def explain(error: Exception) -> CheckpointError | None:
        if isinstance(error, CheckpointError):
            return error
        if not isinstance(error, OSError):
            return None
        kind = DiskRefused if error.errno in _RETRYABLE else CheckpointError
        return kind(f"{doing} failed on rank {rank}: {type(error).__name__}: {error}")

    return agreement.together(group, doing, work, kinds=_KINDS, explain=explain)
