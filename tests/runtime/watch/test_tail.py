import os
from itertools import pairwise
from pathlib import Path

import pytest

from runtime.watch import spread, tail
from runtime.watch.regular_file import opened, read_at_most
from runtime.watch.spread import last_lines, spread_lines
from runtime.watch.tail import Rewritten, Tail


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def texts(lines: list[tuple[int, bytes]]) -> list[str]:
    return [text.decode() for _, text in lines]


def test_lines_come_once_and_only_when_they_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    reader = Tail(path)
    assert reader.read() == []
    append(path, "one\ntwo\nthr")
    assert reader.read() == [(0, b"one"), (4, b"two")]
    assert reader.read() == []
    append(path, "ee\n")
    assert reader.read() == [(8, b"three")]


def test_a_long_file_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", 10)
    path = tmp_path / "lines"
    written = [str(number) * (number % 17) for number in range(50)]
    path.write_text("\n".join(written) + "\n")
    reader, found, offsets = Tail(path), [], []
    while lines := reader.read():
        found += texts(lines)
        offsets += [offset for offset, _ in lines]
    assert found == written
    assert [path.read_bytes()[at:].split(b"\n")[0].decode() for at in offsets] == written


@pytest.mark.parametrize("after", ["one\nTWO\nthree\nfour\n", "one\n", "one\nTWO\n"])
def test_a_file_that_was_cut_back_is_noticed_even_when_it_has_grown_again(tmp_path: Path, after: str) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntwo\n")
    reader = Tail(path)
    reader.read()
    path.write_text(after)
    with pytest.raises(Rewritten):
        reader.read()


def test_a_file_that_was_replaced_or_removed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\n")
    reader = Tail(path)
    reader.read()
    (tmp_path / "other").write_text("one\ntwo\n")
    (tmp_path / "other").rename(path)
    with pytest.raises(Rewritten):
        reader.read()
    path.unlink()
    with pytest.raises(Rewritten):
        reader.read()


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", 8)
    monkeypatch.setattr(tail, "MAX_LINE_BYTES", 32)
    path = tmp_path / "lines"
    path.write_text("a" * 100 + "\nnext\n")
    reader, found = Tail(path), []
    for _ in range(30):
        found += texts(reader.read())
    assert found[-1] == "next"
    assert max(map(len, found)) <= 40


def test_spread_lines_are_whole_lines_of_all_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_WINDOW_BYTES", 16)
    path = tmp_path / "lines"
    written = [f"{number:04d}" + "x" * (number * 7 % 23) for number in range(1000)]
    path.write_text("\n".join(written) + "\ntorn")
    found = [line.decode() for line in spread_lines(path, 20)]
    assert set(found) <= set(written)
    assert 20 <= len(found) <= 28
    numbers = [int(line[:4]) for line in found]
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (0, 999)
    assert max(b - a for a, b in pairwise(numbers)) < 80
    assert [line.decode() for line in last_lines(path, 30)] == written[-30:]
    assert len(last_lines(path, 5000)) == 1000


def test_what_is_no_regular_file_is_not_read_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    for name in ("pipe", "link", "none", "."):
        with opened(tmp_path / name) as fd:
            assert fd is None
        assert read_at_most(tmp_path / name, 10) is None
        assert Tail(tmp_path / name).read() == []
    assert read_at_most(tmp_path / "secret", 3) == b"sec"


def test_a_file_that_is_cut_while_it_is_read_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntwo\n")
    reader, pread, calls = Tail(path), os.pread, []

    def pread_after_the_cut(*arguments: int) -> bytes:
        calls.append(arguments)
        assert len(calls) < 10, "reads on at the end of the file"
        os.truncate(path, 0)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", pread_after_the_cut)
    assert reader.read() == []
