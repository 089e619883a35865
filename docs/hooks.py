"""What the site needs beside mkdocs: pictures drawn when it is built, and CONTRIBUTING.md as one of its pages."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import merman
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Colours that mermaid accepts (it computes shades of them) and what they become, so that a picture follows the theme.
COLOURS = {
    "#fafafa": "var(--md-default-bg-color)",
    "#f0f0f1": "var(--md-code-bg-color)",
    "#767678": "var(--md-default-fg-color--light)",
    "#212122": "var(--md-default-fg-color)",
}
GROUND, FILL, LINE, TEXT = COLOURS
THEME = {
    "theme": "base",
    "look": "classic",
    "layout": "dagre",
    "fontFamily": "inherit",
    "flowchart": {"wrappingWidth": 320},
    "themeVariables": {
        **dict.fromkeys(("primaryColor", "actorBkg", "mainBkg", "labelBoxBkgColor", "noteBkgColor"), FILL),
        **dict.fromkeys(("clusterBkg", "edgeLabelBackground", "labelBackgroundColor"), GROUND),
        **dict.fromkeys(("lineColor", "primaryBorderColor", "clusterBorder", "actorBorder", "signalColor"), LINE),
        **dict.fromkeys(("primaryTextColor", "textColor", "titleColor", "signalTextColor", "actorTextColor"), TEXT),
    },
}


def on_config(config: MkDocsConfig) -> None:
    """Let ```mermaid blocks become SVG."""
    fence = {"name": "mermaid", "class": "mermaid", "format": draw}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def draw(source: str, *_: Any, **__: Any) -> str:
    """A mermaid picture as SVG inside the page: no script, and no request to the server that usually draws it."""
    options = {"svg": {"diagram_id": f"picture-{zlib.crc32(source.encode())}"}}
    svg = merman.Merman().render_svg(f"%%{{init: {json.dumps(THEME)}}}%%\n{source}", json.dumps(options))
    for colour, variable in COLOURS.items():
        svg = re.sub(colour, variable, svg, flags=re.IGNORECASE)
    return f'<div class="picture">{svg}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CONTRIBUTING.md, which lies where GitHub looks for it."""
    text = (Path(config.docs_dir).parent / "CONTRIBUTING.md").read_text()
    files.append(File.generated(config, "contributing.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files that are not pages become text; the one to CONTRIBUTING.md leads to its page."""
    markdown = markdown.replace("](../CONTRIBUTING.md", "](contributing.md")
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)?(?:[A-Z]+(?:\.md)?|README\.md)\)", r"\1", markdown)


def on_post_page(output: str, page: Page, **_: Any) -> None:
    """Refuse a page that its reader's browser would complete from another server."""
    if found := re.search(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'> ]*""", output):
        raise PluginError(f"{page.file.src_uri}: the page loads something from the network: {found[0]}")
