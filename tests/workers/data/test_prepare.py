"""Preparing text once, noticing that it changed, and failing without leftovers."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workers.data import prepare
from workers.data.prepare import DataChanged, check_free_space, prepare_dataset, reopen_dataset
from workers.data.shards import DataDamaged, Dataset
from workers.data.text import DataConfig, TextMissing
from workers.data.tokenizer import ByteTokenizer

EOD = 256


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_bytes(b"first ")
    (text / "b.txt").write_bytes(b"second")
    (text / "c.txt").write_bytes(b"3")
    return DataConfig(path=str(text), cache_dir=str(tmp_path / "cache"))


def rebuilt(config: DataConfig) -> DataConfig:
    return DataConfig(path=config.path, cache_dir=config.cache_dir, rebuild=True)


def leftovers(config: DataConfig) -> list[Path]:
    return list(Path(config.cache_dir).glob("*.partial"))


def test_documents_become_tokens_with_an_end_each(config: DataConfig) -> None:
    dataset = prepare_dataset(config)
    assert dataset.train.dtype == np.uint16
    assert dataset.train.tolist() == [*b"first ", EOD, *b"second", EOD]
    assert [stream.tolist() for stream in dataset.val] == [[*b"3", EOD]]
    (source,) = dataset.meta.sources
    assert (source.train.num_tokens, source.train.num_text_bytes) == (14, 12)
    assert (source.val.num_tokens, source.val.num_text_bytes) == (2, 1)


def test_the_tokens_of_a_run_are_known_by_content_wherever_the_text_lies(config: DataConfig, tmp_path: Path) -> None:
    digest = prepare_dataset(config).digest
    text, moved = Path(config.path[0]), tmp_path / "moved"
    text.rename(moved)
    assert reopen_dataset(config, digest).digest == digest  # the prepared tokens are enough
    elsewhere = DataConfig(path=(str(moved),), cache_dir=config.cache_dir)
    assert reopen_dataset(elsewhere, digest).path == reopen_dataset(config, digest).path  # not prepared again
    anew = DataConfig(path=(str(moved),), cache_dir=str(tmp_path / "other"))
    assert reopen_dataset(anew, digest).digest == digest
    with pytest.raises(TextMissing, match=rf"does not exist, and no folder in .* \(digest {digest[:12]}\); give"):
        reopen_dataset(DataConfig(path=config.path, cache_dir=str(tmp_path / "none")), digest)
    (moved / "a.txt").write_text("something else")
    changed = DataConfig(path=(str(moved),), cache_dir=str(tmp_path / "third"))
    with pytest.raises(DataChanged, match=rf"those of the run {digest[:12]}: this is other text"):
        reopen_dataset(changed, digest)


def test_copies_are_counted_and_stay_in_one_split(config: DataConfig) -> None:
    (Path(config.path[0]) / "d.txt").symlink_to("c.txt")
    dataset = prepare_dataset(config)
    assert dataset.val[0].tolist() == [*b"3", EOD, *b"3", EOD] and ord("3") not in dataset.train
    assert dataset.meta.sources[0].num_copies == Dataset.open(dataset.path).meta.sources[0].num_copies == 1


def test_large_vocabulary_gets_wider_tokens(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(ByteTokenizer):
        vocab_size, eod_id = 70_001, 70_000

    monkeypatch.setattr(prepare, "load_tokenizer", lambda _path: Wide())
    dataset = prepare_dataset(config)
    assert dataset.train.dtype == np.uint32
    assert dataset.train.tolist() == [*b"first ", 70_000, *b"second", 70_000]


def test_text_is_prepared_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    first = prepare_dataset(config, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (13, 13)
    monkeypatch.setattr(prepare, "_build", None)  # a second build would call it
    assert prepare_dataset(config).digest == first.digest


def test_other_settings_are_prepared_apart(config: DataConfig) -> None:
    other = DataConfig(path=config.path, cache_dir=config.cache_dir, val_fraction=0.5)
    assert prepare_dataset(config).path != prepare_dataset(other).path


def test_changed_new_and_missing_files_are_named_with_the_way_out(config: DataConfig) -> None:
    prepare_dataset(config)
    a, d = Path(config.path[0], "a.txt"), Path(config.path[0], "d.txt")
    a.write_bytes(b"FIRST ")  # of the same size
    os.utime(a, (1, 1))  # the clock of a file system may be too coarse to show the change
    with pytest.raises(DataChanged, match=r"a\.txt has changed since.*--data\.rebuild true"):
        prepare_dataset(config)
    a.write_bytes(b"first ")
    d.write_bytes(b"x")
    with pytest.raises(DataChanged, match=r"d\.txt is new"):
        prepare_dataset(config)
    d.unlink()
    a.unlink()
    with pytest.raises(DataChanged, match=r"a\.txt is gone"):
        prepare_dataset(config)


def test_touched_file_is_not_a_changed_file(config: DataConfig) -> None:
    prepare_dataset(config)
    os.utime(Path(config.path[0], "a.txt"), (1, 1))
    prepare_dataset(config)


def test_rebuild_takes_the_changed_text(config: DataConfig) -> None:
    before = prepare_dataset(config)
    Path(config.path[0], "a.txt").write_bytes(b"new")
    after = prepare_dataset(rebuilt(config))
    assert after.path == before.path
    assert after.digest != before.digest
    assert after.train.tolist() == [*b"new", EOD, *b"second", EOD]
    assert before.train.tolist() == [*b"first ", EOD, *b"second", EOD]  # whoever reads the old files may go on
    prepare_dataset(config)


def test_rebuild_mends_damaged_files(config: DataConfig) -> None:
    dataset = prepare_dataset(config)
    (dataset.path / "val.bin").write_bytes(b"")
    with pytest.raises(DataDamaged, match=r"val\.bin.*--data\.rebuild true"):
        prepare_dataset(config)
    assert prepare_dataset(rebuilt(config)).digest == dataset.digest


def test_full_disk_is_refused_before_writing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = prepare.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ValueError, match=r"need up to 1\.0 MB.*0\.0 MB are free.*--data\.cache_dir"):
        prepare_dataset(config)
    assert not list(Path(config.cache_dir).glob("data-*/*"))


def test_free_space_may_be_used_to_the_last_byte(tmp_path: Path) -> None:
    check_free_space(1000, 1000, tmp_path)
    with pytest.raises(ValueError, match="free some space"):
        check_free_space(1001, 1000, tmp_path)


class FailingTokenizer(ByteTokenizer):
    """Fails at the second document, as a disk that fills up."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.num_calls = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        self.num_calls += 1
        if self.num_calls == 2:
            raise self.error
        return super().encode(text)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("Ctrl-C")])
def test_failure_leaves_nothing_and_the_next_try_succeeds(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_tokenizer", lambda _path: FailingTokenizer(error))
        with pytest.raises((ValueError, KeyboardInterrupt), match=r"No space left.*data\.cache_dir|Ctrl-C"):
            prepare_dataset(config)
    assert list(Path(config.cache_dir).glob("data-*/")) == []
    assert len(prepare_dataset(config).train) == 14


def test_what_a_killed_process_left_is_replaced(config: DataConfig) -> None:
    folder = prepare_dataset(config).path
    folder.rename(folder.with_suffix(".partial"))
    (folder.with_suffix(".partial") / "train.bin").write_bytes(b"half")
    assert len(prepare_dataset(config).train) == 14
    assert leftovers(config) == []


def test_unusable_cache_folder_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"could not be prepared under .*file/cache.*data\.cache_dir"):
        prepare_dataset(DataConfig(path=config.path, cache_dir=str(tmp_path / "file" / "cache")))


def _prepare_when_all_are_ready(config: DataConfig, barrier, digests) -> None:
    barrier.wait(20)
    digests.put(prepare_dataset(config).digest)


def test_processes_that_prepare_at_once_all_succeed(config: DataConfig) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, digests = context.Barrier(3), context.Queue()
    # Of three that rebuild at once each would delete what another opens, but for the lock.
    arguments = (rebuilt(config), barrier, digests)
    processes = [context.Process(target=_prepare_when_all_are_ready, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = {digests.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(10)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert found == {prepare_dataset(config).digest}
    assert leftovers(config) == []


def test_default_text_is_prepared_in_seconds_and_opened_without_its_sources(tmp_path: Path) -> None:
    prepared = prepare_dataset(DataConfig(cache_dir=str(tmp_path)))
    dataset = Dataset.open(prepared.path)
    assert dataset.source_names == ("plays", "python")
    assert len(dataset.train) > 10_000_000
    for source in dataset.meta.sources:
        assert 0.04 < source.val.num_text_bytes / (source.val.num_text_bytes + source.train.num_text_bytes) <= 0.05


def test_text_is_checked_without_torch() -> None:  # which alone takes a second to import
    check = "import sys, workers.data.prepare; sys.exit('torch' in sys.modules)"
    root = Path(prepare.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", check], cwd=root, check=False).returncode == 0
