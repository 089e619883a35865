"""Imports go one way: dispatch <- workers <- cluster <- runtime, and dispatch needs torch only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("dispatch", "workers", "cluster", "runtime")


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import, also those inside functions; a relative import as its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def complaints_about(source: str, package: str) -> list[str]:
    """What is wrong with the imports of a file of `package`."""
    complaints = []
    allowed = LAYERS[: LAYERS.index(package) + 1]
    for line, module in imported_modules(source):
        top = module.split(".")[0]
        if module.startswith("."):
            complaints.append(f"line {line}: relative import")
        elif top in (*LAYERS, "tests", "benchmarks", "examples") and top not in allowed:
            complaints.append(f"line {line}: {package} must not import {module}")
        elif package == "dispatch" and top not in allowed and top != "torch" and top not in sys.stdlib_module_names:
            complaints.append(f"line {line}: dispatch needs torch only, not {module}")
    return complaints


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    complaints = [f"{f.relative_to(ROOT)} {c}" for f in files for c in complaints_about(f.read_text(), package)]
    assert not complaints, "\n".join(complaints)


def test_the_check_sees_each_kind_of_wrong_import() -> None:
    assert complaints_about("import runtime.cli", "workers") == ["line 1: workers must not import runtime.cli"]
    assert complaints_about("def f():\n    from cluster import gang", "dispatch") == [
        "line 2: dispatch must not import cluster"
    ]
    assert complaints_about("from . import layer", "dispatch") == ["line 1: relative import"]
    assert complaints_about("import ray", "dispatch") == ["line 1: dispatch needs torch only, not ray"]
    assert complaints_about("from tests.ranks import run_ranks", "runtime") != []
    assert complaints_about("import os, torch.nn\nfrom dispatch.layer import MoELayer", "dispatch") == []
    assert complaints_about("import ray\nfrom workers.worker import Worker", "cluster") == []


def test_each_package_is_the_one_of_this_tree(tmp_path: Path) -> None:
    # From another folder, as the command and Ray's workers do: another distribution could bring the same names.
    code = f"import {', '.join(LAYERS)}\nfor m in ({', '.join(LAYERS)}): print(m.__file__)"
    found = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, f"install this tree first (make test does it):\n{found.stderr}"
    assert found.stdout.split() == [str(ROOT / package / "__init__.py") for package in LAYERS]


@pytest.mark.parametrize("package", LAYERS)
def test_each_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
