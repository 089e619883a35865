"""docs/testing.md names, for every known bug, a test that is there and says so; or why there is none."""

from pathlib import Path

from tests.known_bugs import ALL, REQUIRED, ROOT, complaints_about, ids, ids_named_by_tests


def test_every_known_bug_has_a_test_that_names_it_or_a_reason() -> None:
    complaints = complaints_about((ROOT / "docs" / "testing.md").read_text())
    hint = "`python -m tests.known_bugs` prints the rows as the tests have them"
    assert not complaints, "\n".join([*complaints, hint])


def test_ranges_of_ids_are_written_out() -> None:
    assert ids("B9-B11,P20") == ["B9", "B10", "B11", "P20"]
    assert (len(ALL), len(REQUIRED), set(REQUIRED) <= set(ALL)) == (70, 60, True)


def test_ids_are_read_from_the_body_the_decorators_and_the_comment_right_above() -> None:
    source = """
# B1: far away, belongs to nobody

# B2, P6: right above
@pytest.mark.parametrize("x", [1])  # B3
def test_a():
    # B4, parity 20
    assert "B55555" != "xB7"

def helper():  # B8
    pass

def test_b():
    pass
"""
    assert ids_named_by_tests(source) == {"test_a": {"B2", "P6", "B3", "B4", "P20"}, "test_b": set()}


def test_each_mistake_in_the_tables_is_found(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("# B1\ndef test_one(): pass\n")
    good = {i: "`t.py::test_one`" for i in ALL if i == "B1"}
    reasons = {i: "out of scope" for i in ALL if i not in good}

    def complaints(guarded: dict[str, str], left_out: dict[str, str]) -> list[str]:
        tables = ["# Known bug, and the test that guards against it\n| id | test |\n|---|---|"]
        tables += [f"| {i} | {test} |" for i, test in guarded.items()]
        tables += ["# Rows left out\n| id | reason |\n|---|---|", *(f"| {i} | {r} |" for i, r in left_out.items())]
        found = complaints_about("\n".join(tables) + "\n", root=tmp_path)
        return [c for c in found if not c.endswith("left out, but required")]

    assert complaints(good, reasons) == []
    assert complaints({}, reasons) == ["B1: in neither table"]
    assert complaints(good, {**reasons, "B1": "twice"}) == ["B1: in both tables"]
    assert complaints(good, {**reasons, "B6": ""}) == ["B6: left out without a reason"]
    assert complaints({"B1": "later"}, reasons) == ["B1: no test"]
    assert complaints({"B1": "`none.py::test_one`"}, reasons) == ["B1: no file none.py"]
    assert complaints({"B1": "`t.py::test_two`"}, reasons) == ["B1: no test test_two in t.py"]
    without_b2 = {i: r for i, r in reasons.items() if i != "B2"}
    assert complaints({**good, "B2": "`t.py::test_one`"}, without_b2) == ["B2: t.py::test_one does not name it"]


def test_a_required_bug_cannot_be_left_out() -> None:
    text = "# Rows left out\n| id | reason |\n|---|---|\n| B1 | no time |\n| B6 | no tensor parallelism |\n"
    required = [c for c in complaints_about(text) if "but required" in c]
    assert required == ["B1: left out, but required"]
