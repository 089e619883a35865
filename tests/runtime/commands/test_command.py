"""What a subcommand is: found by its name, listed with its line of help, its options read."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import cli
from runtime.commands.command import Group, choose, group_parser, read_options

ROOT = Path(__file__).parents[3]
HOME = """
HELP = "Come back."

def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=3)
    parser.leave("others", REST)

def run(options):
    print(options.steps, options.others, options.command_line)
    return 5
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is a subcommand and leaves what it does not know."""
    (tmp_path / "home_command.py").write_text(HOME.replace("REST", repr("unknown options")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "home_command", raising=False)
    return "home_command"


def modules_of(commands: dict[str, str | Group]) -> Iterator[str]:
    for entry in commands.values():
        yield from modules_of(dict(entry.commands)) if isinstance(entry, Group) else [entry]


def test_a_new_subcommand_is_one_module_and_one_line(
    home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "home", home)
    assert cli.main(["home", "--steps", "4", "--run.seed", "a b"]) == 5
    assert capsys.readouterr().out == "4 ['--run.seed', 'a b'] trimtab home --steps 4 --run.seed 'a b'\n"
    assert cli.main(["--help"]) == 0
    assert "  home      Come back.\n" in capsys.readouterr().out
    assert cli.main(["home", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: trimtab home [-h] [--steps STEPS]\n\nCome back.\n")
    assert cli.main(["home", "--steps", "x"]) == 2
    assert "trimtab home: error: argument --steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "left", "steps"),
    [
        ("everything", ["--steps", "4", "--", "ls", "-l"], None),
        ("behind --", ["ls", "-l"], 4),
    ],
)
def test_what_a_subcommand_leaves_unread_is_given_to_it(
    rest: str, left: list[str], steps: int | None, home: str, tmp_path: Path
) -> None:
    (tmp_path / "home_command.py").write_text(HOME.replace("REST", repr(rest)))
    options = read_options(home, "trimtab home", ["--steps", "4", "--", "ls", "-l"])
    assert (options.others, getattr(options, "steps", None)) == (left, steps)


def test_the_help_lists_the_choices_in_one_column_and_an_unknown_one_is_refused(
    home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    far = Group(word="WHERE", help="Go there.", description="Go.", commands={})
    walk = Group(word="PLACE", help="", description="Walk.", commands={"home": home, "elsewhere": far})
    assert choose(walk, "walk", ["home", "--x"]) == "home"
    text = group_parser(walk, "walk").format_help()
    assert text.startswith("usage: walk PLACE [options]\n")
    assert "places:\n  home       Come back.\n  elsewhere  Go there.\n" in text
    assert "`walk PLACE --help` explains its options." in text
    for arguments, message in (
        (["xyz"], "'xyz' is no place; choose from home, elsewhere"),
        (["hmoe"], "'hmoe' is no place; did you mean home?"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        ([], text),
    ):
        with pytest.raises(SystemExit) as stop:
            choose(walk, "walk", arguments)
        assert (stop.value.code, message in capsys.readouterr().err) == (2, True), arguments


def test_every_subcommand_of_trimtab_has_the_three_names_and_is_imported_without_torch() -> None:
    modules = list(modules_of(cli.COMMANDS))
    assert len(modules) == len(set(modules)) >= 20
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.HELP.endswith('.') and callable(module.add_arguments) and callable(module.run), name\n"
        "    assert not {'torch', 'ray', 'numpy'} & set(sys.modules), name"
    )
    command = [sys.executable, "-c", script, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["doctor {run} --json", "cluster manifest slurm --nodes 2 --out"])
@pytest.mark.parametrize(
    ("file", "said"), [("file/x", "must be a folder, or a new name for one"), ("", "is a folder; name")]
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, file, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = command.format(run=tmp_path).split()
    assert cli.main([*words, str(tmp_path / file)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["chaos quick", "plan tiny", "compare --laws sign", "replay a"],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([*command.split(), "--out", str(tmp_path / "file" / "new")]) == 2
    assert f"must be a folder, or a new name for one, and {tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_laws_may_be_named_by_one_option_or_by_several():
    given = read_options("runtime.commands.compare.command", "trimtab", ["--laws", "sign", "none", "--laws", "newton"])
    assert given.laws == ["sign", "none", "newton"]
