"""A file is there whole or not at all, and who could not write it says which one."""

import errno
import os
import re

import pytest

from workers.record.atomic_file import write_atomically


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_what_fails_is_told_with_the_file_that_was_meant_and_leaves_the_old_one(call, tmp_path, monkeypatch):
    (path := tmp_path / "report.html").write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'") + "$"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert (list(tmp_path.iterdir()), path.read_text()) == ([path], "old")


def test_a_text_with_bytes_that_are_none_is_written_with_their_numbers(tmp_path):
    write_atomically(tmp_path / "report.html", "run \udcff é")
    assert (tmp_path / "report.html").read_bytes() == b"run \\udcff " + "é".encode()
