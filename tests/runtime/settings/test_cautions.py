"""What is told of a run unasked, and what is not."""

from dataclasses import replace
from typing import Any

import pytest

from runtime.settings.cautions import WINDOW, TrainingWarnings, cautions
from runtime.settings.config_file import load_config, override


def test_an_import_without_a_law_or_data_is_told_so_with_the_way_out() -> None:
    config = override(load_config("tiny"), ["--balance.law", "none", "--optim.lr", "0.002"])
    data, load = cautions(config, is_imported=True)
    assert "built-in demo text, with optim.lr 0.002; import it again with --data.path" in data
    assert "nothing balances the load" in load and "--aux.loss global_batch" in load
    (load,) = cautions(config, is_imported=False)
    assert "start a new run with" in load
    for settled in (["--aux.loss", "switch"], ["--balance.law", "sign"], ["--optim.freeze", "[router]"]):
        assert not cautions(override(config, [*settled, "--data.path", "a.txt"]), is_imported=True)
    lora = override(config, ["--model.lora.rank", "2", "--data.path", "a.txt"])
    assert not cautions(lora, is_imported=True)
    (drawn,) = cautions(lora, is_imported=False)
    assert "model.lora.rank 2 trains adapters of a model whose own weights stay as they were drawn" in drawn
    dense = replace(config, model=replace(config.model, num_dense_layers=config.model.num_layers))
    assert not cautions(dense, is_imported=False)


def test_copies_of_experts_that_every_rank_has_are_told_to_be_none() -> None:
    config = override(load_config("tiny"), ["--parallel.expert_copies", "2", "--workers", "2"])
    assert not cautions(config, is_imported=False)
    (said,) = cautions(override(config, ["--parallel.ep_size", "1"]), is_imported=False)
    assert "parallel.expert_copies (2) places no copies: each rank has all experts" in said


def told(law: str, *lines: dict[str, Any]) -> list[str]:
    warnings = TrainingWarnings(law)
    sound = {"loss": 2.0, "max_vio_batch": 0.2, "max_vio_floor": 0.1, "dead_experts": 0}
    return [text for line in lines for text in warnings.notice(sound | line)]


@pytest.mark.parametrize(
    ("law", "line", "words"),
    [
        ("none", {"max_vio_batch": 1.5}, "mean of 20 steps, and 0.1 by chance; nothing balances the load"),
        ("adaptive", {"dead_experts": 2}, "2 or more experts got no token"),
        ("adaptive", {"loss": None}, "no loss of the last 20 steps is a finite number"),
        ("adaptive", {"loss": 2.3}, "the loss has risen to 2.21, mean of 20 steps, from 2 at its best"),
    ],
)
def test_what_lasts_for_a_window_is_told_once(law: str, line: dict[str, Any], words: str) -> None:
    assert told(law, *[{}] * WINDOW, *[line] * (WINDOW // 2)) == []
    (text,) = told(law, *[{}] * WINDOW, *[line] * (3 * WINDOW))
    assert words in text


def test_what_chance_or_a_law_at_work_does_is_not_told() -> None:
    assert told("sign", *[{"max_vio_batch": 1.5}] * 60) == []  # on its way
    assert told("none", *[{"max_vio_batch": 1.5, "max_vio_floor": 0.9}] * 60) == []
    assert told("none", *[{"dead_experts": 3, "max_vio_floor": 2.0}] * 60) == []  # fewer tokens than experts
    assert told("none", *[{"dead_experts": 3}, {}] * 30) == []
