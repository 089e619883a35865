"""Bytes and Hugging Face tokenizers behind one interface."""

import json
from pathlib import Path

import pytest

from workers.data.tokenizer import ByteTokenizer, load_tokenizer


def write_tokenizer(path: Path, vocab: dict[str, int]) -> Path:
    """A word-level tokenizer file as `tokenizers` writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_the_configuration_of_a_model_names_the_end_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json", {"[UNK]": 0, "day": 1, "</s>": 2})
    added = load_tokenizer(str(file))
    assert (added.vocab_size, added.eod_id) == (4, 3)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    named = load_tokenizer(str(file))
    assert (named.vocab_size, named.eod_id) == (3, 2)
    # An id that the tokenizer lacks cannot end a document.
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load_tokenizer(str(file)).name == added.name


def test_bytes_survive_the_round_trip() -> None:
    tokenizer = load_tokenizer(None)
    ids = tokenizer.encode("Grüße 😀\n")
    assert ids.tolist() == list("Grüße 😀\n".encode())
    assert tokenizer.encode("Grüße 😀\n".encode()).tolist() == ids.tolist()
    assert tokenizer.decode([*ids.tolist(), tokenizer.eod_id]) == "Grüße 😀\n"


def test_incomplete_character_is_shown_and_does_not_fail() -> None:
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_end_of_document_is_the_last_id_and_no_other_token(tmp_path: Path) -> None:
    assert (ByteTokenizer.vocab_size, ByteTokenizer.eod_id) == (257, 256)
    # Ids have a gap at 3: the number of entries, 4, is the id of "night" already.
    file = write_tokenizer(tmp_path / "words.json", {"[UNK]": 0, "day": 1, "and": 2, "night": 4})
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (6, 5)
    assert tokenizer.encode("day and night").tolist() == [1, 2, 4]
    assert tokenizer.decode([1, 2, 4, 5]) == "day and night"


@pytest.mark.parametrize("as_object", [False, True])
def test_the_end_of_document_of_a_trained_model_is_its_own_token(as_object: bool, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json", {"[UNK]": 0, "day": 1, "</s>": 2, "night": 3})
    plain = load_tokenizer(str(file))
    end = {"content": "</s>", "lstrip": False} if as_object else "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (4, 2)
    assert tokenizer.decode([1, 2, 3]) == "day night"
    assert tokenizer.name != plain.name  # their prepared text differs
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(ValueError, match=r"has no token '<end>', which tokenizer_config\.json beside it names"):
        load_tokenizer(str(file))


def test_name_tells_tokenizers_apart(tmp_path: Path) -> None:
    first = load_tokenizer(str(write_tokenizer(tmp_path / "a.json", {"[UNK]": 0, "x": 1})))
    again = load_tokenizer(str(write_tokenizer(tmp_path / "a.json", {"[UNK]": 0, "x": 1})))
    other = load_tokenizer(str(write_tokenizer(tmp_path / "a.json", {"[UNK]": 0, "y": 1})))
    assert first.name == again.name != other.name


def test_unusable_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"other\.json holds no tokenizer"):
        load_tokenizer(str(tmp_path / "other.json"))
