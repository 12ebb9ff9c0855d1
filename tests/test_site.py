"""What docs/hooks.py adds to the pages of the site. `make docs` checks their links."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the docs extra makes the site")
pytest.importorskip("griffe")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import griffe  # noqa: E402
import hooks  # noqa: E402


def test_recipes_are_shown_below_their_names() -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="libraries.md"))
    nothing: Any = None
    shown = hooks.on_page_markdown((ROOT / "docs" / "libraries.md").read_text(), page, nothing, nothing)
    recipes = list(ROOT.glob("examples/recipes/*.py"))
    assert len(recipes) >= 6
    for path in recipes:
        name = f"examples/recipes/{path.name}"
        assert f"[{name}]({name})\n\n```python\n{path.read_text()}```\n" in shown


@pytest.mark.parametrize("notebook", hooks.NOTEBOOKS)
def test_a_notebook_is_a_page_with_its_figures(notebook: str) -> None:
    page, figures = hooks.page_of(notebook)
    name = Path(notebook).stem
    assert page.startswith("# ")
    assert f"[Download the notebook]({name}.ipynb)" in page
    assert len(figures) >= 4
    assert all(page.count(f"]({figure})") == 1 and content[1:4] == b"PNG" for figure, content in figures.items())
    assert re.search(r"```text\n[^`]*^pretrained +.*\d\d\.\d", page, flags=re.MULTILINE)  # what cells print
    assert ".ipynb)" not in page.replace(f"]({name}.ipynb)", "")  # links lead to pages of the site


def test_the_page_of_pictures_shows_what_cells_draw() -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="pictures.md"))
    nothing: Any = None
    shown = hooks.on_page_markdown((ROOT / "docs" / "pictures.md").read_text(), page, nothing, nothing)
    figures = re.findall(r"^!\[.*\]\(examples/notebooks/(compare_\d\.png)\)$", shown, flags=re.MULTILINE)
    assert len(figures) == 2
    assert set(figures) <= set(hooks.page_of("examples/notebooks/compare.ipynb")[1])
    assert shown.count("```text\n") == 2  # the verdict and the report


def test_a_picture_is_a_link_to_itself() -> None:
    assert hooks.on_page_content('<img alt="a" src="b.png" />') == '<a href="b.png"><img alt="a" src="b.png" /></a>'


def test_signatures_write_out_what_all_callbacks_share() -> None:
    """Beside each stands the first sentence of its description."""
    extensions = griffe.load_extensions(hooks.PlainDocstrings, hooks.WrittenOut)
    package = griffe.load("lightning_tpgm", search_paths=[ROOT], extensions=extensions)
    for name in ("tpgm.TPGMCallback", "ftp.FTPCallback", "wise_ft.WiSEFTCallback"):
        callback = package[f"callbacks.{name}"]
        parameters = {parameter.name: parameter for parameter in callback["__init__"].parameters}
        assert "shared" not in parameters
        assert list(parameters)[-6:] == ["exclude", "pretrained", "log", "summary", "anchor_device", "save_anchor"]
        assert str(parameters["exclude"].annotation) == "Sequence[str]"
        assert parameters["log"].default == "'summary'"
        assert "\n    save_anchor: Whether checkpoints hold the anchors.\n" in callback.docstring.value
    parameters = {parameter.name: parameter for parameter in package["callbacks.tpgm.TPGMCallback.__init__"].parameters}
    assert str(parameters["every_n_steps"].default) == "4"  # not a name of the package
    assert str(package["observing.shown.Shown.report"].returns) == "list[dict[str, Any]]"


def test_all_notebooks_are_pages() -> None:
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/notebooks/*.ipynb")} == set(hooks.NOTEBOOKS)
