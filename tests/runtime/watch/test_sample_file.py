import json
from pathlib import Path

import pytest

from runtime.watch import sample_file as module
from runtime.watch.sample_file import SampleFile
from runtime.watch.tail import Rewritten
from tests.runtime.watch.text_run import LAYERS, make_text_run, sample


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_text_run(tmp_path / "run") / "samples.jsonl"


def polled(path: Path) -> SampleFile:
    found = SampleFile(path)
    while found.poll():
        pass
    return found


def test_the_samples_of_a_step_come_with_the_experts_of_a_layer(path: Path) -> None:
    samples = polled(path)
    assert samples.num == 8
    found = samples.at_step(20, 2)
    assert found is not None
    assert (found["steps"], found["step"], found["layers"]) == ([0, 20, 40, 60], 20, list(LAYERS))
    for number, shown in enumerate(found["samples"]):
        line = sample(20, number)
        assert shown["experts"] == line["experts"][LAYERS[2]]
        assert {name: shown[name] for name in ("tokens", "num_prompt_tokens")}.items() <= line.items()


def test_without_a_step_or_with_one_of_none_the_last_one_is_shown(path: Path) -> None:
    samples = polled(path)
    for step in (None, 21):
        found = samples.at_step(step, 0)
        assert found is not None and found["step"] == 60


def test_samples_of_later_steps_are_read_as_they_come(path: Path) -> None:
    samples = polled(path)
    with path.open("a") as file:
        file.write(json.dumps(sample(80, 0)))
        file.flush()
        assert not samples.poll()  # not whole yet
        file.write("\n")
    assert samples.poll()
    found = samples.at_step(None, 0)
    assert found is not None and (found["step"], len(found["samples"])) == (80, 1)
    path.write_text(json.dumps(sample(0, 0)) + "\n")  # the run has resumed from an earlier step
    with pytest.raises(Rewritten):
        samples.poll()


def test_a_run_without_samples_has_none(tmp_path: Path) -> None:
    samples = polled(tmp_path / "samples.jsonl")
    assert (samples.num, samples.at_step(None, 0)) == (0, None)


HOSTILE = [
    {"tokens": 3, "experts": [1], "prompt": ["x"], "num_prompt_tokens": "many"},
    {"tokens": [1, None, {"a": 1}], "experts": {"l": [[-1], [2**40], "x"]}, "num_prompt_tokens": -4},
    {"tokens": ["a", "b"], "experts": {"l": [[True], [1.5], [1], [2]]}, "num_prompt_tokens": 10**30},
    {"tokens": ["x" * 1500] * 5000, "experts": {"y" * 10**5: [[1] * 100] * 20}},
    {"tokens": ["a"], "experts": {str(n): [[n]] for n in range(9000)}},
    {"tokens": ["a"], "experts": {"l": {"a": 1}}},
]


@pytest.mark.parametrize("odd", HOSTILE)
def test_hostile_samples_are_cut_to_what_a_page_can_show(tmp_path: Path, odd: dict) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1, "sample": 0, **odd}) + "\n")
    found = polled(path).at_step(None, 0)
    assert found is not None
    [shown] = found["samples"]
    assert len(json.dumps(found, allow_nan=False)) < 1e6
    assert len(shown["experts"]) == len(shown["tokens"]) <= module.MAX_TOKENS
    assert all(isinstance(each, str) for each in [*shown["tokens"], *found["layers"]])
    assert 0 <= shown["num_prompt_tokens"] <= len(shown["tokens"])
    assert all(row is None or all(type(each) is int and each >= 0 for each in row) for row in shown["experts"])


def test_lines_that_are_no_samples_are_passed_over_and_a_long_file_is_kept_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", 3)
    monkeypatch.setattr(module, "MAX_SAMPLES", 2)
    bad = ["nonsense", "[" * 9999, "[]", '{"step": -1, "sample": 0}', '{"step": 1e9, "sample": 0}', '{"sample": 1}', ""]
    good = [json.dumps({"step": step, "sample": number}) for step in range(6) for number in range(4)]
    (tmp_path / "samples.jsonl").write_text("\n".join([*bad, *good]) + "\n")
    found = polled(tmp_path / "samples.jsonl").at_step(None, 0)
    assert found is not None
    assert (found["steps"], len(found["samples"])) == ([3, 4, 5], 2)
