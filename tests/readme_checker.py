"""Finds paths and commands that a Markdown text names and the tree does not have."""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHELLS = {"sh", "bash", "shell", "console"}
MADE_LATER = {"runs", ".venv"}  # by a run, by make
SOURCE_FILE = re.compile(r"\.(py|md|toml|yaml|yml|cfg)$")
STANDS_FOR_THE_READERS_OWN = re.compile(r"^(/|~|\.\./|my|your|path/to|https?:|s3:|file:)|[<>*{}…]|\$")


def code_blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, language and content of every fenced block."""
    for match in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def broken_links(text: str, folder: Path = ROOT) -> list[str]:
    """Targets of links and pictures that are not there, seen from `folder`."""
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)|<img[^>]+src=\"([^\"]+)\"", text)
    paths = [markdown or html for markdown, html in targets]
    return [f"link to {p}: no such file" for p in paths if ":" not in p and not (folder / p).exists()]


def broken_paths(text: str) -> list[str]:
    """Inline code that reads like a path of this tree and is none."""
    return [f"`{word}`: no such path" for word in inline_code(text) if _looks_like_a_path(word) and not _exists(word)]


def broken_commands(text: str) -> list[str]:
    """Commands, in shell blocks and in inline code, whose target, subcommand, option, module or file is not there."""
    lines = [line for _, language, block in code_blocks(text) if language in SHELLS for line in _commands(block)]
    lines += [code for code in inline_code(text) if re.match(r"(make|trimtab|python3?|torchrun|\.venv/bin/\w+) ", code)]
    return [f"{line}: {problem}" for line in lines for words in _simple_commands(line) for problem in _problems(words)]


def line_of_first_command(text: str) -> int | None:
    return next((line for line, language, _ in code_blocks(text) if language in SHELLS), None)


def _looks_like_a_path(word: str) -> bool:
    if " " in word or STANDS_FOR_THE_READERS_OWN.search(word) or word.split("/")[0] in MADE_LATER:
        return False
    if "/" not in word:
        return bool(re.fullmatch(r"[\w-]+\.(py|md|toml)|Makefile|LICENSE", word))
    # tokens/s is a unit: a path has a known start or a known end.
    return (ROOT / word.split("/")[0]).exists() or bool(SOURCE_FILE.search(word)) or word.endswith("/")


def _exists(path: str) -> bool:
    return (ROOT / path.split("::")[0]).exists()


def _commands(block: str) -> list[str]:
    """The lines to type: without prompts, continuation marks, and, where there are prompts, without the output."""
    lines = block.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip()]


def _simple_commands(line: str) -> list[list[str]]:
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", ";", "|"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):  # not VAR=value in front of a command
            commands[-1].append(word.removeprefix(".venv/bin/") if not commands[-1] else word)
    return [words for words in commands if words]


def _problems(words: list[str]) -> list[str]:
    program, rest = words[0], words[1:]
    if program == "make":
        return _make_problems(rest)
    if program == "trimtab":
        return _trimtab_problems(rest)
    problems = [] if program in ("git", "cd") else [f"no file {w}" for w in rest if _is_missing_source_file(w)]
    if re.fullmatch(r"python(3(\.\d+)?)?|torchrun", program) and "-m" in rest:
        module = rest[rest.index("-m") + 1]
        problems += [] if _module_exists(module) else [f"no module {module}"]
    return problems


def _make_problems(rest: list[str]) -> list[str]:
    targets = [word for word in rest if "=" not in word and not word.startswith("-")]
    known = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    problems = [f"no make target {target}" for target in targets if target not in known]
    arguments = [shlex.split(word.removeprefix("ARGS=")) for word in rest if word.startswith("ARGS=")]
    if "train" in targets:
        problems += [problem for words in arguments for problem in _trimtab_problems(["train", *words])]
    return problems


def _trimtab_problems(rest: list[str]) -> list[str]:
    cut = rest.index("--") if "--" in rest else len(rest)
    subcommand = _subcommand(rest[:cut])
    known = _options_of(subcommand)
    if known is None:
        return [f"no subcommand {subcommand}"]
    options = [word.split("=")[0] for word in rest[:cut] if word.startswith("--")]
    problems = [f"no option {option}" for option in options if option not in known]
    problems += [f"no file {word}" for word in rest[:cut] if _is_missing_source_file(word)]
    if rest[cut + 1 :] and subcommand != "cluster up":  # what stands behind -- there is Ray's
        inner = [] if subcommand == "submit" else ["train"]
        problems += _trimtab_problems([*inner, *(word for word in rest[cut + 1 :] if word != "...")])
    return problems


def _subcommand(rest: list[str]) -> str:
    """The words that choose what to do, as "cluster manifest slurm"."""
    words = rest[:1] if rest and not rest[0].startswith("-") else []
    while " ".join(words) in ("bench", "cluster", "cluster manifest") and rest[len(words) :]:
        words.append(rest[len(words)])
    return " ".join(words)


@functools.cache
def _options_of(subcommand: str) -> frozenset[str] | None:
    """Options in the help of a subcommand ("" is the command itself); None where it does not exist."""
    arguments = [*subcommand.split(), "--help-all" if subcommand == "train" else "--help"]
    code = f"import sys; from runtime.cli import main; sys.exit(main({arguments!r}))"
    env = {**os.environ, "COLUMNS": "250", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    return frozenset(re.findall(r"--[\w.-]+", done.stdout)) if done.returncode == 0 else None


def _is_missing_source_file(word: str) -> bool:
    return bool(SOURCE_FILE.search(word)) and not STANDS_FOR_THE_READERS_OWN.search(word) and not _exists(word)


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
