"""The documentation site: it has every page and every public name, and the examples in docstrings run."""

import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from dispatch.exchange.registry import BACKENDS
from dispatch.laws import LAWS
from runtime.commands.command import CommandParser
from tests.readme_checker import ROOT, code_blocks
from tests.synthetic_run import make_run
from workers.training.optimizer import OPTIMIZERS

DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PUBLIC = [
    f"{package}.{name}" for package in ("dispatch", "runtime") for name in importlib.import_module(package).__all__
]


def pages_of(entry: object) -> list[str]:
    """The pages in a part of the navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    inner = entry if isinstance(entry, list) else list(entry.values()) if isinstance(entry, dict) else []
    return [page for each in inner for page in pages_of(each)]


def test_the_navigation_goes_by_task_and_has_every_page_once() -> None:
    tasks = [next(iter(entry)) for entry in SITE["nav"]]
    assert tasks == ["Start", "Train", "Fine-tune", "Cluster", "Balance", "Extend", "Reference", "Results"]
    there = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert sorted(pages_of(SITE["nav"])) == sorted([*there, "contributing.md"])


def test_the_reference_has_every_public_name_and_no_other() -> None:
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: (\S+)$", reference, re.MULTILINE)) == sorted(PUBLIC)


def test_the_examples_in_public_docstrings_run() -> None:
    failures: list[str] = []
    num_examples, laws = 0, set(LAWS)
    for name in PUBLIC:
        package, _, attribute = name.partition(".")
        value = getattr(importlib.import_module(package), attribute)
        for test in doctest.DocTestFinder().find(value, name, module=False):
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failures.append)
            num_examples += result.attempted
    for name in set(LAWS) - laws:
        LAWS.forget(name)
    assert not failures, "".join(failures)
    assert num_examples > 20


def test_the_code_of_the_page_how_to_add_runs(tmp_path: Path) -> None:
    before = [(LAWS, set(LAWS)), (OPTIMIZERS, set(OPTIMIZERS)), (BACKENDS, set(BACKENDS))]
    made: list[dict[str, Any]] = []
    for _, language, code in code_blocks((DOCS / "how-to-add.md").read_text()):
        if language == "python":
            made.append({"__name__": "mine"})
            exec(code, made[-1])
    law, optimizer, _, command, exchange = made
    assert law["config"].entry.options == {"cap": 1.0}
    model = nn.Linear(2, 2)
    assert OPTIMIZERS["my_sgd"].build(model, optimizer["config"]).defaults["momentum"] == 0.9
    assert BACKENDS["my_plain"].build is exchange["my_plain"]
    parser = CommandParser()
    command["add_arguments"](parser)
    assert command["run"](parser.parse_args([str(make_run(tmp_path / "run"))])) == 0
    for registry, names in before:
        for name in set(registry) - names:
            registry.forget(name)


def test_the_code_of_the_page_on_rl_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2} | sizes | heads
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    [code] = [code for _, language, code in code_blocks((DOCS / "rl.md").read_text()) if language == "python"]
    made: dict[str, Any] = {"__name__": "mine"}
    exec(code, made)
    assert made["sent"]["model.layers.1.block_sparse_moe.experts.7.w2.weight"] == (32, 16)
    assert all(parameter.grad is not None for parameter in made["model"].parameters())
    assert not any(layer.moe.router.tokens_per_expert_E.any() for layer in made["model"].layers)
