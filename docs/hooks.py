"""What the site needs beyond docs/: other pages of the repository, notebooks, linked files, docstrings as Markdown."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from textwrap import indent
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTER = (
    "CHANGELOG.md",
    "SECURITY.md",
    "examples/benchmark/README.md",
    "examples/benchmark/protocol.md",
    "examples/digits/README.md",
    "examples/overhead/README.md",
)
"""Pages that lie outside of docs/: one copy in the repository, one in the site, at the same path from its root."""
NOTEBOOKS = ("examples/notebooks/compare.ipynb", "examples/notebooks/after.ipynb")
"""Each is a page with its outputs, as they are in the file, and is there to download."""
RECIPE = re.compile(r"^\[(examples/recipes/\w+\.py)\]\(\.\./\1\)$", flags=re.MULTILINE)
"""A line that is a link to a recipe, and nothing else: the site shows the file below it."""
CELL = re.compile(r"^\[`(.+)`\]\(\.\./(examples/notebooks/\w+\.ipynb)\)$", flags=re.MULTILINE)
"""A line that is code with a link to a notebook: the site shows what that cell of it prints and draws."""
LINK = re.compile(r"\[([^\]]*)\]\(([^):#]+)(#[^)]*)?\)")


def targets(source: str, text: str) -> set[str]:
    """The files of the repository that a page's relative links and pictures lead to."""
    return {posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) for _, path, _ in LINK.findall(text)}


def outputs_of(notebook: str) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """Each cell's source with its printed text and figures as Markdown, and the figures by their name."""
    name = posixpath.basename(notebook).removesuffix(".ipynb")
    cells: list[tuple[str, str]] = []
    figures: dict[str, bytes] = {}
    for cell in json.loads((ROOT / notebook).read_text())["cells"]:
        source, shown = "".join(cell["source"]), []
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                shown.append(f"```text\n{''.join(output['text'])}```")
            else:
                figure = f"{name}_{len(figures) + 1}.png"
                figures[figure] = base64.b64decode(output["data"]["image/png"])
                shown.append(f"![What {source.splitlines()[-1]!r} draws]({figure})")
        if cell["cell_type"] == "code":
            cells.append((f"```python\n{source}\n```", "\n\n".join(shown)))
        else:
            cells.append((source.replace(".ipynb)", ".md)"), ""))
    return cells, figures


def page_of(notebook: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by their name."""
    name = posixpath.basename(notebook).removesuffix(".ipynb")
    cells, figures = outputs_of(notebook)
    (first, _), *_ = cells
    title, *rest = first.partition("\n")
    cells[0] = f"{title}\n\n[Download the notebook]({name}.ipynb)\n{''.join(rest)}", ""
    return "\n\n".join(part for cell in cells for part in cell if part) + "\n", figures


def shown_of(found: re.Match[str]) -> str:
    """A link to a notebook with what one of its cells shows below it."""
    code, notebook = found.groups()
    (shown,) = (shown for source, shown in outputs_of(notebook)[0] if shown and code in source)
    return found[0] + "\n\n" + shown.replace("](", f"]({posixpath.dirname(notebook)}/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the outer pages, the notebooks, and what pages link to outside of docs/."""
    linked = {path for file in files.documentation_pages() for path in targets("docs/page.md", file.content_string)}
    for source in OUTER:
        linked |= {path for path in targets(source, (ROOT / source).read_text()) if not path.endswith(".md")}
    inner = {path for path in linked if path.startswith("docs/") or not (ROOT / path).is_file()}
    for notebook in NOTEBOOKS:
        page, figures = page_of(notebook)
        files.append(File.generated(config, notebook.replace(".ipynb", ".md"), content=page))
        for name, figure in figures.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(notebook), name), content=figure))
    for path in sorted({*OUTER, *NOTEBOOKS, *linked} - inner):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show recipes. Point links at the copies; an outer page's link to what the site lacks becomes plain text."""
    source = page.file.src_uri
    if source not in OUTER:
        markdown = RECIPE.sub(lambda found: f"{found[0]}\n\n```python\n{(ROOT / found[1]).read_text()}```", markdown)
        return CELL.sub(shown_of, markdown).replace("](../", "](").replace(".ipynb)", ".md)")
    if "/" in source:  # tables name every method: what they are is found first
        page.meta["search"] = {"boost": 0.3}
    folder = posixpath.dirname(source)

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2]))
        is_picture = markdown[found.start() - 1 : found.start()] == "!"
        return found[0] if is_picture or files.get_file_from_path(path) is not None else found[1]

    return LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A picture is a link to itself: a phone shows it small, and at its size after a tap."""
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)


class PlainDocstrings(griffe.Extension):
    """Docstrings are written to be read in a terminal: `::` opens a block there, and doctests stand alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text, *doctests = obj.docstring.value.replace("::\n", ":\n").partition("\n>>> ")
            examples = indent("".join(doctests).strip(), "    ")
            obj.docstring.value = f"{text}\nExamples:\n{examples}\n" if examples else text


class WrittenOut(griffe.Extension):
    """Signatures show the types and the numbers that names of the package stand for."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all signatures. Give callbacks the docstrings that they take over when they are imported."""
        self._package = pkg
        shared = pkg["callbacks.shared.Shared"].docstring.value
        self._shared = re.findall(r"^    (\w+): (.*?\.)(?=\s|$)", shared, flags=re.MULTILINE | re.DOTALL)
        for name in ("report", "plot", "explain"):
            pkg["callbacks.asked.Asked"][name].docstring = pkg["observing.shown.Shown"][name].docstring
        self._visit(pkg)

    def _visit(self, of: griffe.Module | griffe.Class) -> None:
        for member in of.members.values():
            if isinstance(member, griffe.Function):
                if "shared" in member.parameters and member.name == "__init__":
                    self._write_out_shared(of, member.parameters)
                for parameter in member.parameters:
                    parameter.annotation = self._meaning(parameter.annotation)
                    parameter.default = self._meaning(parameter.default)
                member.returns = self._meaning(member.returns)
            elif isinstance(member, griffe.Module | griffe.Class):
                self._visit(member)

    def _write_out_shared(self, callback: Any, parameters: griffe.Parameters) -> None:
        """Put the keyword arguments of all callbacks in the place of ``**shared``, each with its first sentence."""
        base = self._package["callbacks.method.MethodCallback"]["__init__"].parameters
        del parameters["shared"]
        for name, _ in self._shared:
            of_all = base[name]
            keyword = griffe.ParameterKind.keyword_only
            parameters.add(griffe.Parameter(name, annotation=of_all.annotation, kind=keyword, default=of_all.default))
        lines = "".join(f"    {name}: {first}\n" for name, first in self._shared)
        callback.docstring.value = re.sub(
            r"^    shared: .*\n", lambda _: lines, callback.docstring.value, flags=re.MULTILINE
        )

    def _meaning(self, written: Any) -> Any:
        if isinstance(written, griffe.ExprBinOp):
            left, right = self._meaning(written.left), self._meaning(written.right)
            return griffe.ExprBinOp(left, written.operator, right)
        if isinstance(written, griffe.ExprSubscript):
            return griffe.ExprSubscript(written.left, self._meaning(written.slice))
        if not isinstance(written, griffe.ExprName):
            return written
        package, _, path = written.canonical_path.partition(".")
        try:
            found = self._package[path] if package == self._package.name and path else None
        except KeyError:  # an argument's own name, for instance
            return written
        is_constant = isinstance(found, griffe.Attribute) and found.value is not None
        return self._meaning(found.value) if is_constant else written
