"""What a reader copies from docs/ runs, and its sentences are read once."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_tpgm
from lightning_tpgm import TPGMCallback
from lightning_tpgm.callbacks.method import MethodCallback
from my_project import ConvNet, Photos, ViT, photos
from toys import quiet_trainer

PAGES = sorted(Path(__file__).parents[1].joinpath("docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The code of each block, at the line where it stands in the page: errors then point there."""
    text = page.read_text()
    found = (match for match in BLOCK.finditer(text) if match[1] == language)
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


def pages_with(language: str) -> Any:
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


@pytest.fixture(autouse=True)
def _in_the_readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    convnet = ConvNet()
    convnet(photos(32, seed=0).tensors[0])  # BatchNorm has seen data
    torch.save(convnet.state_dict(), "pretrained.pt")
    torch.save(ViT().state_dict(), "vit.pt")


def run(page: Path, count: int | None = None) -> dict[str, Any]:
    """The Python of a page, or its first blocks, in one namespace, from top to bottom."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page, "python")[:count]:
        exec(compile(block, page, "exec"), names)
    return names


@pages_with("python")
def test_python_of_a_page_runs(page: Path) -> None:
    fitted = [value for value in run(page).values() if isinstance(value, MethodCallback)]
    assert all(callback.anchor for callback in fitted)
    assert fitted or page.stem == "several"  # nothing is trained there


@pages_with("yaml")
def test_yaml_of_a_page_is_a_configuration(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "config.yaml").write_text(block)
        cli = LightningCLI(
            ConvNet,
            Photos,
            run=False,
            args=["--config", str(tmp_path / "config.yaml")],
            seed_everything_default=False,
            save_config_callback=None,
        )
        assert any(isinstance(callback, MethodCallback) for callback in cli.trainer.callbacks)


def test_blocks_are_of_known_kinds() -> None:
    """Python and YAML run here. A shell's lines are examples' names and the command line, tested elsewhere."""
    kinds = {match[1] for page in PAGES for match in BLOCK.finditer(page.read_text())}
    assert kinds <= {"python", "yaml", "console", "text", "bibtex"}


def test_code_fits_a_phone() -> None:
    """As wide as docs/site.css makes room for."""
    code = [line for page in PAGES for match in BLOCK.finditer(page.read_text()) for line in match[2].splitlines()]
    assert [line for line in code if len(line) > 56] == []


ROOT = PAGES[0].parents[1]
PROSE = [ROOT / "README.md", *PAGES, *sorted(ROOT.glob("lightning_tpgm/**/*.py"))]


def prose(path: Path) -> str:
    """A page, or the docstrings of a module, with an empty line before each item, entry, heading and row."""
    if path.suffix == ".md":
        text = re.sub(r"^(```|---\n).*?^(```|---)$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        return re.sub(r"^(?= *(?:[-*|#!:]|\d\.) ?)", "\n", re.sub(r"\]\([^)]*\)", "]", text), flags=re.MULTILINE)
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    text = "\n\n".join(ast.get_docstring(node) or "" for node in nodes)
    text = re.sub(r"::\n\n(?: .*\n|\n)+|^>>>(?:.+\n?)+", ":\n\n", text, flags=re.MULTILINE)  # formulas, doctests
    return re.sub(r"^(?= *(?:- |\w+: |\w+:$))", "\n", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_sentence_has_at_most_25_words(path: Path) -> None:
    paragraphs = [part for part in re.split(r"\n\s*\n", prose(path)) if not re.match(r" *[|#:<!]", part)]
    found = [sentence for part in paragraphs for sentence in re.split(r"[.!?][\"'*`)\]]*\s+(?=[^a-z0-9])", part)]
    words = [[word for word in sentence.split() if re.search(r"\w", word)] for sentence in found]
    assert [" ".join(sentence) for sentence in words if len(sentence) > 25] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_list_does_not_follow_a_table_at_once(path: Path) -> None:
    """It would become rows of the table."""
    assert not re.search(r"^\|.*\|\n[-*\d]", path.read_text(), flags=re.MULTILINE)


def text_of(name: str) -> str:
    return (PAGES[0].parent / name).read_text()


def test_arguments_are_those_of_the_callback() -> None:
    text = text_of("tuning.md")
    table = text[text.index("| `TPGMCallback(...)`") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, flags=re.MULTILINE)
    parameters = inspect.signature(TPGMCallback).parameters.values()
    assert [name for name, _ in rows] == [parameter.name for parameter in parameters]
    assert [eval(default) for _, default in rows] == [parameter.default for parameter in parameters]


def test_defaults_that_are_named_in_passing() -> None:
    """Where a default changes, these sentences do."""
    every = inspect.signature(TPGMCallback).parameters["every_n_steps"].default
    assert f"`every_n_steps` ({every})" in text_of("tuning.md")
    assert every == 4
    assert all("every fourth" in text_of(name) for name in ("how.md", "cost.md"))


def test_every_method_is_in_the_choice() -> None:
    section = text_of("choosing.md").partition("## The methods")[2]
    callbacks = [name for name in lightning_tpgm.__all__ if name.endswith("Callback")]
    assert [name for name in callbacks if f"| `{name}` |" not in section] == []


def test_api_lists_everything_public() -> None:
    listed = re.findall(r"^::: lightning_tpgm\.(\w+)$", text_of("api.md"), flags=re.MULTILINE)
    assert set(listed) >= set(lightning_tpgm.__all__)


def test_recipe_freezes_the_statistics() -> None:
    recipes = next(page for page in PAGES if page.stem == "recipes")
    network = run(recipes, count=1)["convnet"]
    pretrained = torch.load("pretrained.pt", weights_only=True)
    found = network.state_dict()
    assert not torch.equal(found["features.0.weight"], pretrained["features.0.weight"])
    assert torch.equal(found["features.1.running_mean"], pretrained["features.1.running_mean"])


def _text(node: ast.AST) -> str:
    """A literal with X in the place of what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "X"


def _messages(path: Path) -> Iterator[str]:
    """All texts of a file but its docstrings."""
    tree = ast.parse(path.read_text())
    spare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        spare |= {id(part) for part in ast.walk(node) if isinstance(node, ast.JoinedStr) and part is not node}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        if is_text and id(node) not in spare:
            yield _text(node)


def test_sentences_of_messages_are_short() -> None:
    """No chain of semicolons, either. How long what is put in gets is for other tests."""
    files = sorted((PAGES[0].parents[1] / "lightning_tpgm").rglob("*.py"))
    sentences = [s for path in files for text in _messages(path) for s in re.split(r"(?<=[.!?])\s+", text)]
    assert len(sentences) > 1000
    assert [s for s in sentences if len(s.split()) > 25 or ("; " in s and len(s.split()) > 5)] == []


def test_quoted_messages_are_those_of_the_package() -> None:
    """Between the dots of a quotation stand the very words."""
    files = (PAGES[0].parents[1] / "lightning_tpgm").rglob("*.py")
    with pytest.raises(RuntimeError) as of_lightning:
        quiet_trainer(TPGMCallback(), TPGMCallback())
    said = [str(of_lightning.value), *(text for path in files for text in _messages(path))]
    page = text_of("troubleshooting.md")
    table = page.partition("## Ten common mistakes")[2].partition("##")[0]
    quotes = re.findall(r'\*"([^"]+)"\*', page) + re.findall(r'(?<=[| ])"([^"]+)"(?=[ ,])', table)
    assert len(quotes) >= 19
    words = {part.strip() for quote in quotes for part in quote.split("...") if part.strip()}
    assert [part for part in sorted(words) if not any(part in text for text in said)] == []
    assert len(re.findall(r"^\| (?!mistake)[^-]", table, flags=re.MULTILINE)) == 10
