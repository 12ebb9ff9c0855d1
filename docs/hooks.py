"""What the site needs beyond its pages: files of the repository that they link to, and docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, and what a page links to outside of docs/: one copy in the repository, one in the site."""
    pages = [file.content_string for file in files.documentation_pages()]
    linked = {path for page in pages for path in re.findall(r"\]\(\.\./([^)#]+)\)", page)}
    for path in sorted({"CHANGELOG.md", *linked}):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Point these links at the copies."""
    return markdown.replace("](../", "](")


class PlainDocstrings(griffe.Extension):
    """Docstrings are written to be read in a terminal: `::` opens a block there, and doctests stand alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text, *doctests = obj.docstring.value.replace("::\n", ":\n").partition("\n>>> ")
            examples = indent("".join(doctests).strip(), "    ")
            obj.docstring.value = f"{text}\nExamples:\n{examples}\n" if examples else text
