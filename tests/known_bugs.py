"""Which test guards which known bug. `python -m tests.known_bugs` prints the rows of docs/testing.md's table.

A test names the ids it guards in its body or in the comment right above it: `# B17`, `# B2, P6`, `# parity 6` (P6).
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ID = re.compile(r"\b[BP][1-9]\d?\b")


def ids(ranges: str) -> list[str]:
    """Written out: "B1-B3,P20" is B1, B2, B3, P20."""
    names = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        names += [f"{first[0]}{number}" for number in range(int(first[1:]), int((last or first)[1:]) + 1)]
    return names


ALL = ids("B1-B40,P1-P30")
REQUIRED = ids("B1-B5,B7,B9-B28,B30,B31,B33-B35,B37-B40,P1-P6,P8-P18,P20-P23,P25-P27,P29")


def ids_named_by_tests(source: str) -> dict[str, set[str]]:
    """For each test function of a file: the ids in its body, its decorators and the comment right above them."""
    lines = source.splitlines()
    named = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while start > 0 and lines[start - 1].startswith("#"):
                start -= 1
            text = re.sub(r"\bparity (?=\d)", "P", "\n".join(lines[start : node.end_lineno]))
            named[node.name] = set(ID.findall(text))
    return named


def table_below(heading: str, text: str) -> dict[str, str]:
    """First column -> second column of the first table after a heading; separator and header rows left out."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|([^|]*)\|(.*)\|\s*$", section[1] if section else "", re.MULTILINE)
    return {first.strip(): second.strip() for first, second in rows if ID.fullmatch(first.strip())}


def complaints_about(text: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the two tables of docs/testing.md."""
    guarded, left_out = (
        table_below("Known bug, and the test that guards against it", text),
        table_below("Rows left out", text),
    )
    complaints = [f"{i}: in neither table" for i in ALL if i not in guarded and i not in left_out]
    complaints += [f"{i}: in both tables" for i in ALL if i in guarded and i in left_out]
    complaints += [f"{i}: left out, but required" for i in REQUIRED if i in left_out]
    complaints += [f"{i}: left out without a reason" for i, reason in left_out.items() if not reason]
    for i, cell in guarded.items():
        tests = re.findall(r"`([^`]+)`", cell)
        complaints += [f"{i}: no test"] if not tests else []
        complaints += [f"{i}: {problem}" for test in tests if (problem := _problem_with(i, test, root))]
    return complaints


def _problem_with(bug_id: str, test: str, root: Path) -> str | None:
    path, _, function = test.partition("::")
    if not (root / path).is_file():
        return f"no file {path}"
    named = ids_named_by_tests((root / path).read_text())
    if function not in named:
        return f"no test {function} in {path}"
    return None if bug_id in named[function] else f"{test} does not name it"


def rows() -> list[str]:
    """The table's rows, from what the tests name."""
    found = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for function, names in ids_named_by_tests(path.read_text()).items():
            for name in names if path.name != "test_known_bugs.py" else ():
                found[name].append(f"`{path.relative_to(ROOT)}::{function}`")
    return [f"| {i} | {'<br>'.join(found[i])} |" for i in ALL if i in REQUIRED or i in found]


if __name__ == "__main__":
    print("\n".join(rows()))
