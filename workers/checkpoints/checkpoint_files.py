"""The files of a checkpoint folder, and how damage to them is found.

    checkpoints/step_00000040/   complete: the name is given by a rename after everything was verified
        __<rank>_0.distcp        tensors, as torch.distributed.checkpoint (DCP) writes them
        .metadata                DCP's index: a pickle, which `index.read_index` reads without running any code of it
        manifest.json            step, world size, extra values, size and sha256 of each file; written last
    checkpoints/.step_*          being written or removed; never read
    checkpoints/superseded_*     later steps that a resumed run left behind; never read or removed

Nothing here is collective: workers.checkpoints.checkpoint decides which rank does what.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dispatch.errors import InvalidValue, UserError

CHECKPOINTS = "checkpoints"  # the folder of a run directory that holds them
FORMAT = 1
MANIFEST = "manifest.json"
INDEX = ".metadata"

_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or does not fit; the same on all ranks. The message says what to do."""


class DiskRefused(CheckpointError):
    """The disk is full or failed: the same write may succeed when there is space or the disk is mended."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint is damaged and was not read.

    Attributes:
        path: the checkpoint. file: the damaged file in it. reason: what is wrong with it.
        previous: the newest intact checkpoint before it, None if there is none, or if it was not looked for.
    """

    def __init__(self, path: Path | str, file: str, reason: str, previous: Path | str | None = None) -> None:
        super().__init__(path, file, reason, previous)  # all in args, so that it survives the way between processes
        self.path, self.file, self.reason = Path(path), file, reason
        self.previous = None if previous is None else Path(previous)

    def __str__(self) -> str:
        way_out = "remove it, or restore the file from a copy"
        if self.previous is not None:
            run, step = self.previous.parent.parent, step_of(self.previous)
            way_out = f"step {step} before it is intact: take it by --step {step}, or resume with "
            way_out += f"--resume {run} --step {step}"
        return f"checkpoint {self.path} is damaged: {self.file} {self.reason}; {way_out}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a complete checkpoint.

    files: name -> [size in bytes, sha256]. extra: the JSON values that `save` was given.
    """

    step: int
    world_size: int
    files: dict[str, tuple[int, str]]
    extra: dict[str, Any]
    torch: str = str(torch.__version__)
    format: int = FORMAT


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs under `root`, the run's checkpoints folder."""
    return root / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name. Raises InvalidValue for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InvalidValue(f"{path} is not a checkpoint folder: its name must be step_ and at least 8 digits")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """The completed checkpoints by step, ascending. Damaged ones are listed too: to skip them would hide the damage."""
    return sorted((path for path in root.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of)


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint, None without any."""
    return next(reversed(list_checkpoints(root)), None)


def set_aside_later(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, for a run that resumes from it, and return their new paths.

    Otherwise a run that crashes before its next save would resume from steps of the history that it had left.
    """
    moved = []
    for path in (path for path in list_checkpoints(root) if step_of(path) > step):
        aside = path.with_name(f"superseded_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        moved.append(path.rename(aside))
    return moved


def discard(path: Path) -> None:
    """Remove a checkpoint: first hide it under another name, so that it is never seen half removed."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def enough_to_remove(root: Path, missing_bytes: int) -> list[Path]:
    """The oldest checkpoints that have at least `missing_bytes` together; empty if all but the newest have fewer."""
    paths: list[Path] = []
    for path in list_checkpoints(root)[:-1]:
        paths.append(path)
        missing_bytes -= sum(file.stat().st_size for file in path.iterdir())
        if missing_bytes <= 0:
            return paths
    return []


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest with its own checksum, and force file and folder to the disk."""
    try:
        # Through JSON and back, as a reader will see it: all keys are strings then, and the checksums agree.
        body = json.loads(json.dumps(asdict(manifest), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the extra values of {path} are not JSON: {error}") from error
    with (path / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"sha256": _digest_of_json(body), "manifest": body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, checked against its own checksum. Raises CheckpointCorrupt."""
    try:
        outer = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        body, sha256 = outer["manifest"], outer["sha256"]
    except FileNotFoundError:
        raise CheckpointCorrupt(path, MANIFEST, "is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(path, MANIFEST, f"cannot be read ({error})") from error
    except RecursionError as error:
        raise CheckpointCorrupt(path, MANIFEST, "cannot be read (it is nested too deeply)") from error
    if sha256 != _digest_of_json(body):
        raise CheckpointCorrupt(path, MANIFEST, "was changed after it was written")
    if type(body) is dict and type(body.get("format")) is int and body["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {body['format']}, this version reads {FORMAT}; use its own version")
    try:
        return _manifest_of(body)
    except (TypeError, ValueError, KeyError) as error:
        # The checksum does not protect from malice, as whoever changes the file can change it too.
        raise CheckpointCorrupt(path, MANIFEST, f"is not a manifest: {error}") from error


def _manifest_of(body: Any) -> Manifest:
    expected = {"step": int, "world_size": int, "files": dict, "extra": dict, "torch": str, "format": int}
    if type(body) is not dict or body.keys() != expected.keys():
        raise TypeError(f"it must hold {', '.join(expected)}, and nothing else")
    for name, kind in expected.items():
        if type(body[name]) is not kind or (kind is int and body[name] < 0):
            raise TypeError(f"{name} must be of type {kind.__name__}, and not negative")
    files = {name: _file_entry(name, entry) for name, entry in body["files"].items()}
    return Manifest(**{**body, "files": files})


def _file_entry(name: str, entry: Any) -> tuple[int, str]:
    # Only a slash, "." or ".." can lead out of the folder.
    if "/" in name or "\0" in name or name in ("", ".", "..", MANIFEST):
        raise ValueError(f"{name[:100]!r} is no name of a file in it")
    if type(entry) is not list or list(map(type, entry)) != [int, str] or entry[0] < 0:
        raise TypeError(f"of {name[:100]!r} it must hold size and sha256")
    return entry[0], entry[1]


def check_file(path: Path, name: str, size: int, sha256: str) -> None:
    """Compare a file with its entry in the manifest. Raises CheckpointCorrupt."""
    try:
        found_size, found_sha256 = digest(path / name)
    except FileNotFoundError:
        raise CheckpointCorrupt(path, name, "is missing") from None
    if found_size != size:
        raise CheckpointCorrupt(path, name, f"has {found_size} bytes, not the {size} that were written")
    if found_sha256 != sha256:
        raise CheckpointCorrupt(path, name, "has other bytes than were written (sha256 differs)")


def digest(file: Path) -> tuple[int, str]:
    """Size in bytes and sha256 of a file."""
    with file.open("rb") as stream:
        return os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Force the entries of a folder to the disk: without it a rename may not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_of_json(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
