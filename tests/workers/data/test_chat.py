"""What of a conversation is learned, by ids written out, and lines that cannot be read."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from workers.data.chat import PLAIN_TEMPLATE, ChatTemplate, load_template
from workers.data.prepare import prepare_dataset
from workers.data.shards import FIRST, TARGET, Dataset
from workers.data.text import DataConfig

EOD = 256
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "é"},
    {"role": "assistant", "content": "ü!"},
]
# As transformers marks answers: the token that ends the turn, and the end of the line, are learned too.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\\n' }}{% endif %}"
)

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def _prepare(folder: Path, lines: list[object], **settings: str) -> Dataset:
    path = folder / "chat.jsonl"
    held_out = {"text": "x" * 20}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, held_out]))
    config = {"path": str(path), "cache_dir": str(folder / "cache"), "format": "chat", "val_fraction": 0.1}
    return prepare_dataset(DataConfig(**{**config, **settings}))


def test_only_what_the_assistant_writes_is_learned(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, [{"messages": TURNS}, {"prompt": "1+1=", "completion": "2"}, {"text": "ab"}])
    asked = b"<|system|>\nS\n<|user|>\nhi\n<|assistant|>\n"
    again = "<|user|>\né\n<|assistant|>\n".encode()
    expected = [
        (asked, False), (b"yo\n", True), (again, False), ("ü!\n".encode(), True), ([EOD], True),
        (b"1+1=", False), (b"2", True), ([EOD], True),
        (b"ab", True), ([EOD], True),
    ]  # fmt: skip
    assert dataset.train.tolist() == [token for part, _ in expected for token in part]
    assert (dataset.train_flags & TARGET > 0).tolist() == [learned for part, learned in expected for _ in part]
    firsts = [0, len(asked + again) + 3 + 4 + 1]
    assert np.flatnonzero(dataset.train_flags & FIRST).tolist() == [*firsts, firsts[1] + 6]
    assert dataset.val_flags[0].tolist() == [TARGET | FIRST, *[TARGET] * 20]
    assert dataset.meta.sources[0].train.num_text_bytes == len(dataset.train) - 3


def test_the_models_own_template_is_taken_from_beside_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    rendered = [piece.text for piece in ChatTemplate(CHATML, "test").pieces(TURNS[1:3])]
    assert rendered == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>\n", ""]
    named = [{"name": "default", "template": CHATML}, {"name": "tools", "template": "{{"}]
    for template in (CHATML, named):
        settings = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        found = load_template(None, str(tokenizer))
        assert [piece.text for piece in found.pieces(TURNS[1:3])] == rendered
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}" + PLAIN_TEMPLATE)
    assert load_template(None, str(tokenizer)).pieces(TURNS[1:3])[0].text.startswith("<|im_end|><|user|>")
    (tmp_path / "mine.jinja").write_text(PLAIN_TEMPLATE)
    assert load_template(str(tmp_path / "mine.jinja"), str(tokenizer)).pieces(TURNS[1:3])[0].text.startswith("<|user|>")


def test_malformed_entries_of_the_tokenizers_settings_are_left_out(tmp_path: Path) -> None:
    settings = {"bos_token": {"lstrip": False}, "chat_template": [3, {"name": "tool"}], "eos_token": "<e>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    template = load_template(None, str(tmp_path / "tokenizer.json"))
    assert template.name == ChatTemplate(PLAIN_TEMPLATE, "", {"eos_token": "<e>"}).name


def test_templates_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chat template of there is not valid: .*--data.chat_template FILE"):
        ChatTemplate("{% for %}", "there")
    refusing = ChatTemplate("{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}", "there")
    with pytest.raises(ValueError, match="refuses these messages: one at a time"):
        refusing.pieces(TURNS)
    forgetful = ChatTemplate("{{ messages|length }}: {{ messages[-1].content }}", "there")
    with pytest.raises(ValueError, match="does not write message 3 as a continuation"):
        forgetful.pieces(TURNS)
    with pytest.raises(ValueError, match=r"refuses these messages: .*unsafe"):  # a sandbox, as a model brings it
        ChatTemplate("{{ messages.__class__.__mro__ }}", "there").pieces(TURNS)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", r"this is not JSON \(Expecting property name"),
        ("[1]", "this is list, not an object; a line must be"),
        ('{"txt": "a"}', "this has the fields txt; a line must be"),
        ('{"text": 1}', "text must be a text, not 1"),
        ('{"prompt": "a", "completion": null}', "completion must be a text, not None"),
        ('{"messages": []}', r"messages must be a list of at least one message, not \[\]"),
        ('{"messages": ["a"]}', "message 1 must be an object with role and content, not 'a'"),
        ('{"messages": [{"role": "user"}]}', "message 1 must have a text as its content, not None"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role assistant"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "chat.jsonl"
    good = '{"text": "fine"}\n'
    # In the part to train on, and in the part that is held out.
    for lines, number in (([good, "\n", line + "\n", good * 40], 3), ([good * 40, line + "\n"], 41)):
        path.write_text("".join(lines))
        config = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), format="chat", val_fraction=0.1)
        with pytest.raises(ValueError, match=rf"chat\.jsonl, line {number}: {reason}"):
            prepare_dataset(config)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_text_in_documents_counts_every_token_and_is_prepared_apart(tmp_path: Path) -> None:
    for name, text in (("a.txt", "first"), ("b.txt", "second"), ("c.txt", "3")):
        (tmp_path / name).write_text(text)
    plain = DataConfig(path=str(tmp_path), suffixes=(".txt",), cache_dir=str(tmp_path / "cache"))
    packed = DataConfig(path=plain.path, suffixes=plain.suffixes, cache_dir=plain.cache_dir, pack_documents=True)
    without, dataset = prepare_dataset(plain), prepare_dataset(packed)
    assert without.train_flags is None
    assert dataset.path != without.path
    assert dataset.train.tolist() == without.train.tolist() == [*b"first", EOD, *b"second", EOD]
    assert dataset.train_flags.tolist() == [3, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1]


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.format is 'jsonl'; it must be text or chat"):
        DataConfig(format="jsonl")
    with pytest.raises(ValueError, match=r"data\.chat_template mine\.jinja is for data.format chat, not text"):
        DataConfig(chat_template="mine.jinja")


def test_ids_and_what_is_learned_equal_those_of_transformers(tmp_path: Path) -> None:
    lines = [{"messages": TURNS}, {"messages": TURNS[1:3]}]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["system user assistant assistant hi yo"] * 3, trainer)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    theirs.save_pretrained(tmp_path / "model")
    dataset = _prepare(tmp_path, lines, tokenizer=str(tmp_path / "model" / "tokenizer.json"))
    expected = [
        theirs.apply_chat_template(line["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for line in lines
    ]
    assert dataset.train.tolist() == [token for each in expected for token in each["input_ids"]]
    learned = [mask for each in expected for mask in each["assistant_masks"]]
    assert (dataset.train_flags & TARGET).tolist() == learned
    assert 0 < sum(learned) < len(learned)
    asking = load_template(None, str(tmp_path / "model" / "tokenizer.json")).render_prompt(TURNS[:2])
    assert asking == theirs.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 10000000000 }}", "it took more than 128 MB of memory"),
        ("{{ 'a'.center(10000000000) }}", "it took more than 128 MB of memory"),
        (
            "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "it took .* MB",
        ),
        (LOOP, "it took more than 0.5 s$"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", "it took .* s$"),
        ("{{ (messages | length) ** 99999999 }}", "it took more than 0.5 s$"),
        ("{{ raise_exception('no ' * 9999) }}", r"(no ){100,333}n?$"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ '%(x)s' % {} }}", "KeyError"),
        ("{% for i in range(200000) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_refuses_the_messages_with_its_reason(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template refuses these messages: {reason}"):
        ChatTemplate(source, "test", max_bytes=2**27, max_cpu_s=0.5).pieces(TURNS)


def test_a_template_that_cannot_be_parsed_is_not_valid() -> None:
    with pytest.raises(ValueError, match=r"the chat template of test is not valid: RecursionError"):
        ChatTemplate("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "test")
    with pytest.raises(ValueError, match=r"the chat template of test is not valid: it took more than 0.5 s; give"):
        ChatTemplate("{{ 9 ** 99999999 }}", "test", max_cpu_s=0.5)


def test_the_time_is_for_each_conversation_and_an_end_is_told_again() -> None:
    source = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}{PLAIN_TEMPLATE}"
    template = ChatTemplate(source, "test", max_cpu_s=0.3)
    begun = time.process_time()
    while time.process_time() - begun < 0.1:
        assert len(template.pieces(TURNS)) == 5
    for _ in range(2):
        with pytest.raises(ValueError, match=r"it took more than 0\.3 s"):
            template.pieces([{"role": "user", "content": "loop"}])
