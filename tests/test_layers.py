"""Imports go one way: dispatch <- workers <- cluster <- runtime, and dispatch needs torch only."""

import ast
import re
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
        # Triton comes with torch's CUDA builds; `dispatch/kernels` is imported only where it does.
        elif package == "dispatch" and top not in (*allowed, "torch", "triton", *sys.stdlib_module_names):
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


def imports_of(sources: dict[str, str]) -> dict[str, list[str]]:
    """For each module, of those given as name and source, which of the others it imports, anywhere in its source."""
    graph: dict[str, list[str]] = {}
    for name, source in sources.items():
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from a.b import c` imports the module a.b.c where there is one, else a.b for a name in it.
                found |= {
                    inner if (inner := f"{node.module}.{alias.name}") in sources else node.module
                    for alias in node.names
                }
        graph[name] = sorted(found & sources.keys() - {name})
    return graph


def circle_in(graph: dict[str, list[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty if there are none."""
    left = {name: set(imported) for name, imported in graph.items()}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    if not left:
        return []
    path = [next(iter(left))]
    while path[-1] not in path[:-1]:
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) :]


@pytest.fixture(scope="module")
def graph() -> dict[str, list[str]]:
    """Every module of the four packages and what it imports."""
    files = [file for package in LAYERS for file in (ROOT / package).rglob("*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return imports_of({name: file.read_text() for name, file in zip(names, files, strict=True)})


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, list[str]]) -> None:
    # Also not for types, nor inside a function: who reads one of them would have to read them all.
    assert len(graph) > 100
    assert circle_in(graph) == []


# What nearly all of a package imports, which the picture in docs/architecture.md leaves out, as it says.
BELOW_ALL = {
    "dispatch": {"config", "errors", "values", "layout", "diagnosis", "public", "own_packages", "registry"},
    "workers": {"run_config"},
    "cluster": {"config", "machine"},
    "runtime": {"settings", "runs", "terminal"},
}


def drawn_arrows(text: str) -> set[tuple[str, str, str]]:
    """The arrows of the picture: package, folder, and the folder that it imports from."""
    arrows, package = set(), ""
    for line in text[text.index("```mermaid") :].splitlines():
        words = line.split()
        if words[:1] == ["subgraph"]:
            package = words[1]
        elif words[:1] == ["end"]:
            package = ""
        elif package and "-->" in words:
            folder, _, *others = (word for word in words if word != "&")
            arrows |= {(package, folder, other) for other in others}
    return arrows


def test_the_picture_of_the_architecture_shows_every_import_between_folders(graph: dict[str, list[str]]) -> None:
    arrows = set()
    for name, imported in graph.items():
        package, *inner = name.split(".")
        for other in (each.split(".") for each in imported):
            if inner and other[0] == package and len(other) > 1 and other[1] not in BELOW_ALL[package]:
                arrows.add((package, inner[0], other[1]))
    arrows = {arrow for arrow in arrows if arrow[1] not in (arrow[2], "__main__", *BELOW_ALL[arrow[0]])}
    assert drawn_arrows((ROOT / "docs" / "architecture.md").read_text()) == arrows


def test_the_docstring_of_a_folder_names_every_file_in_it() -> None:
    folders = [
        each for package in LAYERS for each in (ROOT / package).rglob("__init__.py") if each.parent.parent != ROOT
    ]
    assert len(folders) > 40
    unnamed = {}
    for folder in folders:
        module = ast.parse(folder.read_text())
        told = re.findall(r"`([\w.]+)`", ast.get_docstring(module) or "")
        told += [
            node.value for node in ast.walk(module) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        files = {file.stem for file in folder.parent.glob("*.py")} - {"__init__", "__main__"}
        if lacking := files - {name.partition(".")[0] for name in told}:
            unnamed[str(folder.parent.relative_to(ROOT))] = sorted(lacking)
        assert [name for name in told if name.endswith(".py") and not (folder.parent / name).exists()] == []
    assert unnamed == {}


def test_the_check_sees_a_circle() -> None:
    sources = {
        "a.one": "def f():\n    from a import two",
        "a.two": "import torch\nfrom a.three import x",
        "a.three": "if TYPE_CHECKING:\n    import a.one",
        "a.four": "from a.one import f",
    }
    assert circle_in(imports_of(sources)) in (
        ["a.one", "a.two", "a.three", "a.one"],
        ["a.two", "a.three", "a.one", "a.two"],
        ["a.three", "a.one", "a.two", "a.three"],
    )
    assert circle_in(imports_of(sources | {"a.three": ""})) == []


def test_each_package_is_the_one_of_this_tree(tmp_path: Path) -> None:
    # From another folder, as the command and Ray's workers do: another distribution could bring the same names.
    code = f"import {', '.join(LAYERS)}\nfor m in ({', '.join(LAYERS)}): print(m.__file__)"
    found = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, f"install this tree first (make test does it):\n{found.stderr}"
    assert found.stdout.split() == [str(ROOT / package / "__init__.py") for package in LAYERS]


@pytest.mark.parametrize("package", LAYERS)
def test_each_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
