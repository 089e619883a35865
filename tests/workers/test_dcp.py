"""Writing a rank's share: what it takes, and that of what torch says when it fails only a full disk is told as one."""

import errno
from types import SimpleNamespace

import pytest
import torch

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from workers.checkpoints import dcp


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
