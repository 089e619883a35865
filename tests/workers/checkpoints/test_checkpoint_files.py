"""Checkpoints that somebody forged: their checksums fit, and their contents do not."""

import hashlib
import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from workers.checkpoints.checkpoint import load, save, verify
from workers.checkpoints.checkpoint_files import (
    CheckpointCorrupt,
    CheckpointError,
    Manifest,
    digest,
    read_manifest,
    write_manifest,
)
from workers.checkpoints.index import read_index


class _Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def _forge(path, **changed):
    manifest = read_manifest(path)
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    fields = {"step": manifest.step, "world_size": 1, "extra": {}, "files": {n: digest(path / n) for n in names}}
    write_manifest(path, Manifest(**{**fields, **changed}))


def test_an_index_that_would_run_code_is_refused(tmp_path):
    path = save(tmp_path, 1, {"model.x": torch.ones(2)}, {}, None)
    (path / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    _forge(path)
    with pytest.raises(CheckpointCorrupt, match=r"is not an index of tensors .asks for "):
        load(path, {"model.x": torch.zeros(2)}, None)
    assert not (tmp_path / "ran").exists()


def _object_instead_of_tensor(index, path):
    index.state_dict_metadata["model.x"] = BytesStorageMetadata()


def _file_outside(index, path):
    shutil.copy(path / "__0_0.distcp", path.parent / "outside.distcp")
    for info in index.storage_data.values():
        info.relative_path = "../outside.distcp"


def _beyond_the_end(index, path):
    for info in index.storage_data.values():
        info.length += 1


def _no_part(index, path):
    index.state_dict_metadata["model.x"].chunks.clear()
    index.storage_data.clear()


def _no_place(index, path):
    index.storage_data.clear()


def _any_place(index, path):
    index.state_dict_metadata["model.x"].size = torch.Size([1 << 40])
    index.state_dict_metadata["model.x"].chunks[0].sizes = torch.Size([1 << 40])


@pytest.mark.parametrize(
    "forge", [_object_instead_of_tensor, _file_outside, _beyond_the_end, _no_part, _no_place, _any_place]
)
def test_an_index_that_points_elsewhere_than_to_tensors_is_refused(tmp_path, forge):
    path = save(tmp_path, 1, {"model.x": torch.ones(2)}, {}, None)
    index = read_index(path, read_manifest(path).files)
    forge(index, path)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    _forge(path)
    with pytest.raises(CheckpointCorrupt, match=r"not tensors in this folder: .*model.x|asks for .*BytesStorage"):
        load(path, {"model.x": torch.zeros(2)}, None)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little"),  # BINBYTES8 of 2^40 bytes
        b"\x80\x04\x96" + (1 << 40).to_bytes(8, "little"),  # BYTEARRAY8
        b"\x80\x04Nr\xff\xff\xff\xff.",  # LONG_BINPUT: place 2^32 - 1 of a table
    ],
)
def test_an_index_that_claims_more_than_there_is_is_refused_before_anything_is_allocated(tmp_path, raw):
    path = save(tmp_path, 1, {"model.x": torch.ones(2)}, {}, None)
    (path / ".metadata").write_bytes(raw)
    _forge(path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 28), limits[1]))
    try:
        with pytest.raises(CheckpointCorrupt, match=r"is not an index of tensors .(expected|holds LONG_BINPUT)"):
            verify(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _write_by_hand(path, change):
    outer = json.loads((path / "manifest.json").read_text())
    body = change(outer["manifest"])
    sha256 = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"manifest": body, "sha256": sha256}))


FORGED_MANIFESTS = {
    "files a list": lambda body: {**body, "files": [1, 2]},
    "no format": lambda body: {name: value for name, value in body.items() if name != "format"},
    "step a text": lambda body: {**body, "step": "1"},
    "step true": lambda body: {**body, "step": True},
    "step negative": lambda body: {**body, "step": -1},
    "extra null": lambda body: {**body, "extra": None},
    "one thing more": lambda body: {**body, "more": 1},
    "a number": lambda _: 7,
    "entry a number": lambda body: {**body, "files": {"__0_0.distcp": 3}},
    "size a text": lambda body: {**body, "files": {"__0_0.distcp": ["3", "0" * 64]}},
    "name outside": lambda body: {**body, "files": {**body["files"], "../secret": [3, "0" * 64]}},
    "name absolute": lambda body: {**body, "files": {**body["files"], "/etc/passwd": [3, "0" * 64]}},
    "name of a folder": lambda body: {**body, "files": {**body["files"], "..": [3, "0" * 64]}},
}


@pytest.mark.parametrize("forged", FORGED_MANIFESTS)
def test_a_manifest_with_a_right_checksum_and_wrong_content_is_refused(tmp_path, forged):
    secret = tmp_path / "secret"
    secret.write_text("four")
    path = save(tmp_path, 1, {"model.x": torch.ones(2)}, {}, None)
    _write_by_hand(path, lambda body: body)
    verify(path)
    _write_by_hand(path, FORGED_MANIFESTS[forged])
    with pytest.raises(CheckpointCorrupt, match=r"manifest.json is not a manifest") as caught:
        verify(path)
    assert "4 bytes" not in str(caught.value)  # the size of a file outside is nobody's business


def test_a_tensor_file_that_would_run_code_is_refused(tmp_path):
    path = save(tmp_path, 1, {"model.x": torch.ones(2)}, {}, None)
    index = read_index(path, read_manifest(path).files)
    torch.save(_Evil(tmp_path / "ran"), path / "__0_0.distcp")
    for info in index.storage_data.values():
        info.length = (path / "__0_0.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(index))
    _forge(path)
    with pytest.raises(CheckpointError, match=r"(?i)weights.only"):
        load(path, {"model.x": torch.zeros(2)}, None)
    assert not (tmp_path / "ran").exists()
