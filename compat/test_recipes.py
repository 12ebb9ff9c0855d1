"""The recipes of examples/recipes, as they are: the weights end inside their balls, and only what is new is free."""

from __future__ import annotations

import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from properties import assert_inside_ball

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other projects, and ours of random weights

RECIPES = sorted(Path(__file__).parents[1].joinpath("examples", "recipes").glob("*.py"))

# What is new, by the library's own means where it has some; each returns modules.
NEW: dict[str, Callable[[Any], list[Any]]] = {
    "neuralforecast_series": lambda model: [],
    "peft_lora": lambda model: [model.model.base_model.model.classifier.modules_to_save],
    "smp_segmentation": lambda model: [model.model.decoder, model.model.segmentation_head],
    "timm_images": lambda model: [model.model.get_classifier()],
    "torchmetrics_images": lambda model: [model.head],
    "transformers_text": lambda model: [model.model.classifier],
}


def no_network(*_: Any, **__: Any) -> Any:
    raise AssertionError("a recipe downloads nothing")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write logs where they are
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    torch.manual_seed(0)
    done = runpy.run_path(str(recipe), run_name="__main__")
    model, tpgm = done["model"], done["tpgm"]

    assert_inside_ball(model, tpgm.anchor, tpgm.radii, "mars")
    assert any(row["ratio"] < 1 for row in tpgm.report())  # it held something back
    moved = [not torch.equal(model.get_parameter(name).detach(), anchor) for name, anchor in tpgm.anchor.items()]
    assert sum(moved) > len(moved) / 2
    new = {id(parameter) for module in NEW[recipe.stem](model) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        assert (name in tpgm.anchor) is (parameter.requires_grad and id(parameter) not in new), name


def test_only_adapters_are_constrained_with_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both factors of each, and B starts at zero."""
    monkeypatch.chdir(tmp_path)
    recipe = next(path for path in RECIPES if path.stem == "peft_lora")
    anchors = runpy.run_path(str(recipe), run_name="__main__")["tpgm"].anchor
    factors = ["lora_A" if "lora_A" in name else "lora_B" for name in anchors if "lora_" in name]
    assert len(factors) == len(anchors) == 2 * factors.count("lora_B")
    assert not any(anchor.any() for name, anchor in anchors.items() if "lora_B" in name)
