"""YAML of others is refused in a bounded time, with the line that is to blame."""

import time
from pathlib import Path

import pytest

from dispatch.errors import InvalidValue
from runtime.settings.config_file import config_from_yaml, config_from_yaml_file
from runtime.settings.yaml_text import MAX_CHARACTERS, load_yaml

# Nine values, and ten levels that each name the one before nine times: 9^11 values in 600 characters.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"line 2: \*a0 refers to another part of the file"),
        ("a: &a [*a]\n", r"line 1: \*a refers to another part"),
        ("run: {steps: 3, steps: 5}\n", "line 1: steps stands here and in line 1; leave one out"),
        ("run:\n  steps: 3\n  seed: 1\n  steps: 5\n", "line 4: steps stands here and in line 2"),
        ("a: &" + "x" * 900 + " [*" + "x" * 900 + "]\n", r"line 1: \*x{60} refers to another part"),
        ("x" * 900 + ": 1\n" + "x" * 900 + ": 2\n", "line 2: x{60} stands here"),
        ("a: 1\nb: !!int ''\n", "line 2: the tag .*int asks for a type"),
        ("[" * 60000, "line 1: more than 32 values are nested"),
        ("a: " + "1:" * 20000 + "1", "has 40001 digits, and at most 100 are read"),
        ("a: 2001-13-01\n", "not valid YAML: month must be in"),
        ("a: 1\n? [b]\n: 2\n", "line 2: .* is not a name"),
        ("a: {<<: {b: 1}}\n", "line 1: '<<' is not a name"),
        ("a: =\n", "not valid YAML"),
        ("a" * (MAX_CHARACTERS + 1), "longer than 65536 characters"),
    ],
)
def test_a_hostile_document_is_refused_soon_with_its_line(text: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(InvalidValue, match=message):
        load_yaml(text)
    assert time.process_time() - begun < 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {{steps: '{bomb}'}}", "run.steps is '{{a0: .*; it must be a whole number"),
        ("data: {{mix: ['{bomb}']}}", "data.mix is '{{a0: "),
        ("balance: {{options: '{bomb}'}}", "balance.options is"),
        ("run: {{name: '{deep}'}}", "nested too deep"),
        ("x" * 900 + ": 1", "unknown setting x{60}; see"),
    ],
)
def test_a_text_that_would_be_read_as_yaml_again_is_not(text: str, message: str) -> None:
    # The parser of the settings reads texts as YAML of its own where a number is wanted.
    bomb = "{" + BOMB.strip().replace("\n", ", ") + "}"
    begun = time.process_time()
    with pytest.raises(InvalidValue, match=message.replace("{{", "{").replace("{a0", r"\{a0")):
        config_from_yaml(text.format(bomb=bomb, deep="[" * 5000))
    assert time.process_time() - begun < 5


def test_an_endless_file_is_read_to_its_bound() -> None:
    with pytest.raises(InvalidValue, match="longer than 65536 characters"):
        config_from_yaml_file(Path("/dev/zero"))
