"""What mkdocs.yml asks of Python: the pages link to examples, which lie beside docs/ and are put into the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the examples."""
    for path in sorted((ROOT / "examples").iterdir()):
        if path.is_file():
            files.append(File.generated(config, f"examples/{path.name}", content=path.read_text()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """A page whose docstrings name classes and functions as code, without Sphinx's words for what they are."""
    return re.sub(r":(?:class|func|mod|data|meth|attr):(<code>)", r"\1", html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with links to the examples as the site has them."""
    return markdown.replace("](../examples/", "](examples/")
