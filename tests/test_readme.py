"""What a reader copies from the README runs, and it stays a page that is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from my_project import ConvNet, Photos

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPET = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [match[2] for match in SNIPPET.finditer(README) if match[1] == language]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_the_first_screen_has_picture_install_line_and_snippet() -> None:
    first = "\n".join(README.splitlines()[:40])
    at = [first.index(text) for text in ("![", "results/rates.png", "pip install", "exclude=", "trainer.fit(")]
    assert at == sorted(at)


def test_the_snippet_is_five_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line and not line.startswith("#")]
    assert len(lines) == 5


def test_the_install_line_brings_what_the_snippets_import() -> None:
    (installed,) = re.findall(r"^pip install \. (.*)$", blocks("console")[0], flags=re.MULTILINE)
    imported = re.findall(r"^(?:from|import) (\w+)", "".join(blocks("python")), flags=re.MULTILINE)
    assert set(imported) == {"lightning_tpgm", *installed.split()}


@pytest.mark.filterwarnings("ignore:'val_acc' is .* at each of 11 alphas")  # two epochs of random photos
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"model": ConvNet(), "data": Photos()}
    for block in blocks("python"):
        exec(block.replace("max_epochs=5", "max_epochs=2"), names)
    anchors = set(names["callback"].anchor)
    assert anchors
    assert anchors == {name for name, _ in names["model"].named_parameters() if not name.startswith("head.")}
    saved = torch.load("robust.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["features.0.weight"], names["model"].features[0].weight)


def slugs(page: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_its_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://arxiv.org/abs/")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).is_file(), link
        assert not anchor or anchor in slugs((ROOT / path).read_text()), link


def test_every_page_is_linked_to() -> None:
    pages = {f"docs/{page.name}" for page in ROOT.joinpath("docs").glob("*.md")} - {"docs/index.md", "docs/api.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([\w-]+)$|`make ([\w-]+)`", README, flags=re.MULTILINE))
    assert {name for pair in named for name in pair if name} <= targets | {"help"}
    assert {"demo", "test"} <= {name for pair in named for name in pair}


def test_the_overview_has_the_methods_in_the_order_of_the_picture() -> None:
    (table,) = re.findall(r"<!-- table of overview: begin -->\n(.*?)<!-- table of overview: end -->", README, re.DOTALL)
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == ["plain fine-tuning", "WiSE-FT", "FTP", "TPGM", "TPGM, then the sweep"]
