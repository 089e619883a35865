"""The live page's modules as one script: a page that is opened from a disk can load no module, so it holds them."""

import re
from collections.abc import Callable
from importlib.resources import files

_IMPORT = re.compile(r'^import (\{.*?\}|\* as \w+) from "\./(\w+)\.js";$', re.MULTILINE | re.DOTALL)
_EXPORT = re.compile(r"^export ((?:async )?function|const|class) (\w+)", re.MULTILINE)
_OWN = {"report": "report.js", "api": "archive.js"}  # the report's own; all others are the live page's


def page_script() -> str:
    """The report's script, with all that it imports."""
    return joined(lambda name: _read("report", _OWN[name]) if name in _OWN else _read("watch", f"{name}.js"), "report")


def library() -> str:
    """The chart library, with its licence."""
    return f"/*\n{_read('watch', 'uplot.LICENSE.txt')}*/\n{_read('watch', 'uplot.min.js')}"


def style() -> str:
    """The style sheets of the live page, and what a report adds."""
    return "\n".join([_read("watch", "uplot.min.css"), _read("watch", "watch.css"), _read("report", "report.css")])


def joined(source: Callable[[str], str], entry: str) -> str:
    """A module and what it imports as one script: each a function that runs once and gives what the module exports."""
    made: dict[str, str] = {}  # in an order in which they can run

    def add(name: str) -> None:
        if name not in made:
            text = source(name)
            for _, imported in _IMPORT.findall(text):
                add(imported)
            made[name] = _as_function(name, text)

    add(entry)
    return "\n".join(made.values())


def _as_function(name: str, source: str) -> str:
    names = ", ".join(found[1] for found in _EXPORT.findall(source))
    body = _EXPORT.sub(r"\1 \2", _IMPORT.sub(_as_constant, source))
    if re.search(r"^(import|export)\b", body, re.MULTILINE):
        raise ValueError(f"{name}.js has an import or export of a form that is not one of ours")
    return f"const ${name} = (() => {{\n{body}\nreturn {{ {names} }};\n}})();"


def _as_constant(found: re.Match[str]) -> str:
    names, module = found.groups()
    return f"const {names.removeprefix('* as ')} = ${module};"


def _read(package: str, name: str) -> str:
    return (files(f"runtime.{package}") / "static" / name).read_text("utf-8")
