"""The public names: they are there, they cost nothing until they are used, and documents import nothing else."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = ("dispatch", "runtime")


def names_for_type_checkers(source: str) -> list[str]:
    """What an `if TYPE_CHECKING:` imports."""
    [block] = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_there_for_readers_type_checkers_and_at_run_time(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name
    assert sorted(module.__all__) == sorted(names_for_type_checkers((ROOT / package / "__init__.py").read_text()))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018 - the access is what is tested


def test_importing_the_packages_imports_no_torch() -> None:
    code = f"import sys, {', '.join(PUBLIC)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", ["README.md", "docs/laws.md", "docs/run-directory.md", "examples/train_layer.py"])
def test_documents_and_examples_import_public_names_only(path: str) -> None:
    text = (ROOT / path).read_text()
    code = (
        text
        if path.endswith(".py")
        else "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    )
    imports = re.findall(r"^from ((?:dispatch|workers|cluster|runtime)\S*) import", code, re.MULTILINE)
    assert imports
    assert set(imports) <= set(PUBLIC)
