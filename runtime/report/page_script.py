"""Joins the JavaScript modules of the live page into one script, which a report holds.

A browser loads no modules for a page that is opened from a disk (file://).
"""

import re
from collections.abc import Callable
from importlib.resources import files

_IMPORT = re.compile(r'^import (\{.*?\}|\* as \w+) from "\./(\w+)\.js";$', re.MULTILINE | re.DOTALL)
_EXPORT = re.compile(r"^export ((?:async )?function|const|class) (\w+)", re.MULTILINE)
# Modules of the report itself; all others are the live page's. `archive.js` takes the place of `api.js`: it reads the
# numbers from the page instead of asking a server.
_OWN = {"report": "report.js", "api": "archive.js"}


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
    """A module and its imports as one script. Each module becomes a function that runs once and returns its exports.

    Args:
        source: returns the text of a module by its name.
        entry: name of the module to start with.
    Raises:
        ValueError: an import or export has a form that is not supported here: a mistake in our modules.
    """
    made: dict[str, str] = {}  # imported modules first

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
