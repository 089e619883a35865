"""Every path and command named in the README is there; no text of the tree names a place of somebody's machine."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.check_default_run import complaints
from tests.readme_checker import ROOT, broken_commands, broken_links, broken_paths, line_of_first_command
from tests.synthetic_run import make_run
from workers.record.run_log import METRICS

INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[dev]'"
PLACE_OF_A_MACHINE = re.compile(r"(?<![\w./:~}-])/(?:home|Users|root|work|mnt|scratch)/\w")
MARKDOWN = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if p.is_file()]


def test_readme_names_only_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    complaints = broken_links(text) + broken_paths(text) + broken_commands(text)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/how-to-add.md", "docs/architecture.md"])
def test_the_pages_for_developers_name_only_paths_that_exist(name: str) -> None:
    assert broken_paths((ROOT / name).read_text()) == []


def test_readme_is_short_and_starts_with_a_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text) <= 15_000
    first = line_of_first_command(text)
    assert first is not None, "no ```sh block"
    assert first <= 24, "not on the first screen"


def test_the_prose_of_the_readme_is_wrapped_as_the_code_is() -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in prose if len(line) > 120] == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_hold(path: Path) -> None:
    assert broken_links(path.read_text(), folder=path.parent) == []


def test_the_commands_of_the_cluster_guide_exist() -> None:
    assert broken_commands((ROOT / "docs" / "cluster.md").read_text()) == []


@pytest.mark.parametrize("path", ["Makefile", "CONTRIBUTING.md", "docs/testing.md", "README.md"])
def test_one_install_command_everywhere(path: str) -> None:
    text = (ROOT / path).read_text()
    if "pip install -c" in text or path == "Makefile":
        assert INSTALL in text


def test_no_text_names_a_place_of_a_machine() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, check=False, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    complaints = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            complaints += [
                f"{name}:{number}: {line.strip()}"
                for number, line in enumerate(content.decode(errors="replace").splitlines(), 1)
                if PLACE_OF_A_MACHINE.search(line)
            ]
    assert not complaints, "\n".join(complaints)


# The checker itself, on texts with one mistake each.


def test_checker_finds_a_broken_link_and_a_broken_picture() -> None:
    text = 'See [a](docs/none.md), [b](Makefile), [c](https://example.org/x), <img src="docs/none.png">.'
    assert broken_links(text) == ["link to docs/none.md: no such file", "link to docs/none.png: no such file"]


def test_checker_finds_broken_paths_and_leaves_units_and_placeholders_alone() -> None:
    there = "`dispatch/` `tests/ranks.py::run_ranks` `Makefile` `tokens/s` `runs/<name>/report.html` `/dev/shm` `x_TH`"
    assert broken_paths(there) == []
    missing = "`dispatch/nothing.py` `nothing/` `configs/none.yaml` `NONE.md`"
    assert broken_paths(missing) == [f"{word}: no such path" for word in missing.split()]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make trian", "no make target trian"),
        ("$ cd trimtab && make trian  # a comment", "no make target trian"),
        ("python -m benchmarks.nothing", "no module benchmarks.nothing"),
        ("OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/nothing.py", "no file examples/nothing.py"),
        ("trimtab trian", "no subcommand trian"),
        ("trimtab train --modle.hidden 64", "no option --modle.hidden"),
        ("trimtab cluster upp", "no subcommand cluster upp"),
        ("trimtab cluster join 10.0.0.1 --bnid 10.0.0.2", "no option --bnid"),
        ("trimtab cluster manifest slurm --nodes 2 -- --modle.hidden 64", "no option --modle.hidden"),
        ("trimtab submit --no-wiat -- train", "no option --no-wiat"),
        ("trimtab submit -- trian", "no subcommand trian"),
        ("make train ARGS='--modle.hidden 64'", "no option --modle.hidden"),
        ("trimtab train --config configs/nothing.yaml", "no file configs/nothing.yaml"),
    ],
)
def test_checker_finds_broken_commands(command: str, problem: str) -> None:
    complaints = broken_commands(f"Text.\n\n```sh\n{command}\n```\n")
    assert [complaint.split(": ", 1)[1] for complaint in complaints] == [problem]


def test_checker_accepts_commands_that_exist() -> None:
    text = "```console\n$ make train ARGS='--run.steps 5'\noutput: make nothing\n$ make test ARGS='-k router'\n```\n"
    text += "```sh\ngit clone https://example.org/trimtab.git\npython3 -m venv .venv && .venv/bin/pip install -e .\n"
    text += "trimtab generate runs/demo \\\n  --prompt 'Enter; a | ghost'\n```\n"
    assert broken_commands(text) == []
    assert broken_commands("then `make lint` and `trimtab report RUN`") == []


def test_first_command_is_found_by_its_line() -> None:
    assert line_of_first_command("a\n```text\nx\n```\nb\n```sh\nmake train\n```\n") == 6
    assert line_of_first_command("no command") is None


def test_a_place_of_a_machine_is_seen_and_an_address_is_not() -> None:
    assert PLACE_OF_A_MACHINE.search("run " + "/home" + "/me/trimtab")
    assert not PLACE_OF_A_MACHINE.search("https://example.org/mnt/page and docs/mnt/x and ~/scratch/x")


def test_continuous_integration_runs_the_first_commands_of_the_readme_as_they_stand_there() -> None:
    start = (ROOT / "README.md").read_text().partition("\n## Start\n")[2].partition("```sh\n")[2].partition("```")[0]
    printed = [line.partition("#")[0].strip() for line in start.splitlines()]
    run = [re.split(r" 2>&1 | && ", line)[0] for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert printed == ["make train", "make test", "make test-slow"]
    assert [line for line in run if line in printed] == printed


def test_the_look_at_the_default_run_finds_what_is_missing_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert complaints(run) == ["there is no report.html"]
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    lost = re.sub(r'"tokens_returned": \d+', '"tokens_returned": 7', lines[7])
    (run / METRICS).write_text("".join([*lines[:7], lost, *lines[9:]]))
    assert complaints(run)[:2] == [
        "Tokens lost: not good, or not there",
        "steps of metrics.jsonl: 59, not each of 1 to 60 once and in order",
    ]
