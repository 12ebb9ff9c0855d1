"""As many operations are asked of a device in a step as docs/cost.md says, counted on the device meta."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import TPGM, Step
from test_overhead import load
from test_passes import METHODS, HeldOut

PLAIN = "a plain step"
models = load("models")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": models.resnet50,
    "ViT-B/16": lambda: models.Transformer(models.Patches(768), 768, 12, 12),
    "2,000 small tensors": lambda: models.Tiny(2000, 2_000_000),
}
NOT_LAUNCHED = ("empty", "alias", "promote_types", "detach")


def documented() -> dict[str, list[int]]:
    text = (Path(__file__).parents[1] / "docs" / "cost.md").read_text().partition("| operations |")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    return {name: [int(count.replace(",", "")) for count in counts] for name, *counts in rows}


class Operations(TorchDispatchMode):
    """Counts what is carried out; views and new memory are not. Notes the names of all, and those of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.names: set[str] = set()
        self.of_floats: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        self.names.add(function.name().removeprefix("aten::"))
        if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves((args, kwargs))):
            self.of_floats.add(name.removeprefix("aten::"))
        self.count += not function.is_view and not any(word in name for word in NOT_LAUNCHED)
        return function(*args, **(kwargs or {}))


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def plain_step(name: str) -> int:
    """Forward and backward pass at batch size 8, and SGD."""
    module, images = model(name), torch.empty(8, 3, 224, 224, device="meta")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=True)
    optimizer.zero_grad()
    with Operations() as operations:
        module(images).sum().backward()
        optimizer.step()
    return operations.count


@torch.no_grad()
def own_step(method: Any, module: nn.Module) -> Operations:
    """What a method adds to a plain step, or to the end of the fit."""
    parameters = dict(module.named_parameters())
    anchors: dict[str, Tensor] = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}
    if isinstance(method, TPGM):
        method.held_out = HeldOut()  # type: ignore[assignment]
    tensors = Constrained(parameters, anchors, method.norm)
    tensors.prepare(method.has_radii)
    method.place(tensors)
    method.joined(tensors, list(parameters))
    step = Step(torch.optim.SGD(parameters.values(), lr=0.1), 0)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        with Operations() as operations:
            method.before(tensors, step)
            method.change_gradients(tensors, step)
            method.after(tensors, step)
            if method.acts_at_end:
                method.finish(tensors)
    return operations


@pytest.mark.parametrize("name", [*METHODS])
def test_no_more_operations_than_documented(name: str) -> None:
    assert [own_step(METHODS[name](), model(each)).count for each in MODELS] == documented()[name]


def two_dtypes() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3, device="meta"), nn.Linear(4, 3, device="meta", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", [*METHODS])
def test_operations_give_the_same_each_time_on_a_gpu(name: str) -> None:
    """By torch's own list: processes would drift apart, and ``Trainer(deterministic=True)`` makes it an error."""
    text = str(torch.use_deterministic_algorithms.__doc__)
    _, listed = re.split(r"will throw a\s+:class:`RuntimeError` when ``mode", text)  # Python 3.13 takes the indent off
    random = {*re.findall(r"`torch\.(?:\w+\.)*(\w+)`", listed)} - {"scatter_reduce"}  # that of products is
    assert {"cumsum", "put_"} < random
    assert not random & own_step(METHODS[name](), two_dtypes()).of_floats


@pytest.mark.parametrize("name", [*METHODS])
def test_apples_gpus_have_all_operations(name: str) -> None:
    """By torch's own list: an operation of few devices would end every fit on the others."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {entry.partition("(")[0]: entry for entry in text.split("\n- func: ")}
    for operation in own_step(METHODS[name](), two_dtypes()).names:
        delegate = re.search(r"structured_delegate: (\S+)", entries[operation])
        entry = entries[delegate[1] if delegate else operation]
        assert "dispatch:" not in entry or re.search(r"\b(MPS|Composite\w+)\b", entry), operation


def test_operations_of_a_plain_step_are_of_the_documented_size() -> None:
    """Not to the last one: torch decides."""
    assert [plain_step(each) for each in MODELS] == pytest.approx(documented()[PLAIN], rel=0.2)


def test_the_table_has_every_method() -> None:
    assert [*documented()] == [PLAIN, *METHODS]
