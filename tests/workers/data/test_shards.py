"""What workers open: streams, their description, and the refusal of damaged files."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest

from workers.data import shards
from workers.data.prepare import prepare_dataset
from workers.data.shards import DataDamaged, Dataset
from workers.data.text import DataConfig


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        for part in ("a", "b"):
            path = tmp_path / name / part
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"{name} {part}{'!' * (part == 'a')}".encode())
    paths = (str(tmp_path / "one"), str(tmp_path / "two"))
    return prepare_dataset(DataConfig(path=paths, cache_dir=str(tmp_path / "cache"))).path


def test_streams_are_those_of_the_sources(prepared: Path) -> None:
    dataset = Dataset.open(prepared)
    assert dataset.source_names == ("one", "two")
    assert dataset.train.tolist() == [*b"one a!", 256, *b"two a!", 256]
    assert [stream.tolist() for stream in dataset.val] == [[*b"one b", 256], [*b"two b", 256]]
    assert (len(dataset.train), sum(map(len, dataset.val))) == (14, 12)
    assert (dataset.meta.tokenizer, dataset.vocab_size) == ("bytes", 257)
    assert not dataset.train.flags.writeable


def test_copy_on_another_node_opens_and_has_the_same_digest(prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy", copy_function=shutil.copyfile))
    os.utime(copy / "train.bin", (1, 1))
    assert Dataset.open(str(copy)).digest == Dataset.open(prepared).digest


@pytest.mark.parametrize("damage", [b"", b"\0", b"x" * 28])
def test_cut_or_overwritten_stream_is_refused(prepared: Path, damage: bytes) -> None:
    (prepared / "train.bin").write_bytes(damage)
    os.utime(prepared / "train.bin", (1, 1))  # the clock of a file system may be too coarse to show the change
    with pytest.raises(DataDamaged, match=r"train\.bin.*not the file that was written.*--data\.rebuild true"):
        Dataset.open(prepared)


def test_opening_reads_no_stream_whose_size_and_time_are_as_written(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "file_sha256", None)  # a read would call it
    Dataset.open(prepared)
    path = prepared / "train.bin"
    written_ns = path.stat().st_mtime_ns
    path.write_bytes(b"cut")
    os.utime(path, ns=(written_ns, written_ns))
    with pytest.raises(DataDamaged, match="not the file that was written"):
        Dataset.open(prepared)


def test_missing_stream_and_missing_folder_are_named(prepared: Path) -> None:
    (prepared / "val.bin").unlink()
    with pytest.raises(DataDamaged, match=r"val\.bin is missing"):
        Dataset.open(prepared)
    shutil.rmtree(prepared)
    with pytest.raises(DataDamaged, match=r"no prepared text at .* every node sees"):
        Dataset.open(prepared)


def test_damaged_description_is_refused(prepared: Path) -> None:
    meta = prepared / "meta.json"
    fields = json.loads(meta.read_text())
    for text, words in (
        (meta.read_text()[:100], "meta.json is damaged"),
        ("[]", "meta.json is damaged"),
        (json.dumps({**fields, "sources": []}), "does not describe train.bin"),
        (json.dumps({**fields, "vocab_size": 1 << 17}), "does not describe train.bin"),
        (json.dumps({**fields, "format": 0}), "has format 0"),
    ):
        meta.write_text(text)
        with pytest.raises(DataDamaged, match=words):
            Dataset.open(prepared)


def test_error_survives_pickling(prepared: Path) -> None:
    (prepared / "val.bin").unlink()
    with pytest.raises(DataDamaged) as caught:
        Dataset.open(prepared)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_bits_per_byte_count_bytes_of_text_only(prepared: Path) -> None:
    dataset = Dataset.open(prepared)  # 6 tokens for 5 bytes in either source
    assert dataset.tokens_per_byte == (6 / 5, 6 / 5)
    over_all, by_source = dataset.bits_per_byte([10 * math.log(2), 5 * math.log(2)], [6, 6])
    assert over_all == pytest.approx(1.5)
    assert by_source == pytest.approx({"one": 2.0, "two": 1.0})


def test_bits_per_byte_leave_out_what_was_not_read(prepared: Path) -> None:
    over_all, by_source = Dataset.open(prepared).bits_per_byte([5 * math.log(2), 0.0], [3, 0])
    assert by_source == pytest.approx({"one": 2.0})
    assert over_all == pytest.approx(2.0)
