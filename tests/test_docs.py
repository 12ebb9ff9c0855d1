"""What a reader copies from docs/ runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_tpgm
from lightning_tpgm.callbacks.method import MethodCallback
from my_project import ConvNet, Photos, ViT

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
    torch.save(ConvNet().state_dict(), "pretrained.pt")
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
    assert kinds <= {"python", "yaml", "console", "text"}


def test_api_lists_everything_public() -> None:
    text = (PAGES[0].parent / "api.md").read_text()
    assert set(re.findall(r"^::: lightning_tpgm\.(\w+)$", text, flags=re.MULTILINE)) >= set(lightning_tpgm.__all__)


def test_recipe_freezes_the_statistics() -> None:
    recipes = next(page for page in PAGES if page.stem == "recipes")
    network = run(recipes, count=1)["convnet"]
    pretrained = torch.load("pretrained.pt", weights_only=True)
    found = network.state_dict()
    assert not torch.equal(found["features.0.weight"], pretrained["features.0.weight"])
    assert torch.equal(found["features.1.running_mean"], pretrained["features.1.running_mean"])
