"""Writing a rank's share: what it takes, and that of what torch says when it fails only a full disk is told as one."""

import errno
import io
from types import SimpleNamespace

import pytest
import torch

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from workers.checkpoints import dcp
from workers.checkpoints.checkpoint_files import digest


@pytest.mark.parametrize(
    ("text", "free", "is_full"),
    [
        ("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0", 4096, True),
        ("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0", 1 << 30, False),
        ("The size of tensor a (3) must match the size of tensor b (4)", 4096, False),
    ],
)
def test_only_a_failed_write_onto_a_full_disk_is_a_full_disk(text, free, is_full, tmp_path, monkeypatch):
    monkeypatch.setattr(dcp.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
    error = RuntimeError(text)
    told = dcp._system_error(error, tmp_path)
    assert (isinstance(told, OSError) and told.errno == errno.ENOSPC) if is_full else told is error


def test_the_error_of_the_system_behind_that_of_torch_is_told(tmp_path):
    error = RuntimeError("the writer failed")
    error.__cause__ = OSError(errno.EIO, "Input/output error", "/disk/file")
    told = dcp._system_error(error, tmp_path)
    assert isinstance(told, OSError) and (told.errno, told.filename) == (errno.EIO, "/disk/file")


def test_writing_views_of_one_tensor_holds_one_copy_at_a_time(tmp_path):
    stack = torch.zeros(8, 100_000)
    share = {f"model.{index}": row for index, row in enumerate(stack)}
    assert peak_allocated_bytes(lambda: dcp.write_share(tmp_path, share, 0)) < 2 * stack[0].nbytes


def test_a_large_share_goes_into_files_of_about_one_size_with_their_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "_FILE_BYTES", 1 << 16)
    share = {f"model.{index}": torch.rand(1000 * (1 + index % 3)) for index in range(40)}
    written = dcp.write_share(tmp_path, share, 3)
    assert sorted(written.files) == sorted(file.name for file in tmp_path.iterdir())
    assert sorted(written.files) == [f"__3_{number}.distcp" for number in range(4)]
    assert written.files == {name: digest(tmp_path / name) for name in written.files}
    sizes = [size for size, _ in written.files.values()]
    assert max(sizes) < 1.2 * min(sizes)
    for key, file, offset, length in written.pieces:
        piece = io.BytesIO((tmp_path / file).read_bytes()[offset : offset + length])
        assert torch.load(piece, weights_only=True).equal(share[key])
    assert {key for key, *_ in written.pieces} == set(share)


def test_an_error_in_one_of_several_files_is_that_of_the_share(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "_FILE_BYTES", 1 << 10)
    (tmp_path / "__0_2.distcp").mkdir()
    with pytest.raises(IsADirectoryError):
        dcp.write_share(tmp_path, {f"model.{index}": torch.rand(1000) for index in range(8)}, 0)
