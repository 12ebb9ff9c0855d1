"""Invariant 6, "Cheap", counted instead of timed: operations, the size of what they give, and memory that stays."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_tpgm.groups
from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    constrain,
)
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Layout, Spares
from lightning_tpgm.methods import SPD, TPGM, Method, Step
from toys import quiet_trainer

METHODS: dict[str, Callable[[], Any]] = {
    "tpgm": lambda: TPGMCallback(DataLoader(torch.ones(2, 1), 1), every_n_steps=10**6),
    "ftp": FTPCallback,
    "digrap": DiGraPCallback,
    "spd": SPDCallback,
    "l2sp": L2SPCallback,
    "anchor decay": AnchorDecayCallback,
}


class Operations(TorchDispatchMode):
    """Notes the size of each result of what runs inside, and of the new ones: 0 for what is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.results: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            is_new = isinstance(result, Tensor) and not any(
                result is value for value in (*args, *(kwargs or {}).values())
            )
            self.results.append(result.numel() if isinstance(result, Tensor) else 0)
            self.sizes.append(self.results[-1] if is_new else 0)
        return result


class Scales(pl.LightningModule):
    """As many vectors as asked for."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(size) for _ in range(count))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.cat(list(self.scales)).square().sum() * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sizes_in_a_step(method: str, module: Scales, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all results in the callback's share of the third step; 0 for what is done in place."""
    seen: list[list[int]] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Operations() as operations:
                result = function(*args, **kwargs)
            seen.append(operations.sizes)
            return result

        return run

    callback = METHODS[method]()
    made = callback.make_method

    def make_method() -> Method:
        found = made()
        for name in ("change_gradients", "before", "after"):
            setattr(found, name, counted(getattr(found, name)))
        return found

    monkeypatch.setattr(callback, "make_method", make_method)
    quiet_trainer(callback, max_steps=3, max_epochs=None).fit(module, DataLoader(torch.ones(3, 1), 1))
    return [size for sizes in seen[2 * len(seen) // 3 :] for size in sizes]


@pytest.mark.parametrize("method", METHODS)
def test_cheap_operations_do_not_grow_with_the_number_of_small_tensors(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (len(sizes_in_a_step(method, Scales(count, 4), monkeypatch)) for count in (3, 60))
    assert many <= few


@pytest.mark.parametrize("method", METHODS)
def test_cheap_no_intermediate_result_is_larger_than_a_block(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_tpgm.groups, "SHARED", 10)
    monkeypatch.setitem(lightning_tpgm.groups.BLOCK, "cpu", 100)
    sizes = sizes_in_a_step(method, Scales(2, 1000), monkeypatch)
    assert not [size for size in sizes if size > 100]
    assert (100 in sizes) is (method not in ("tpgm", "anchor decay"))  # these read all at once, and write in place


@pytest.mark.parametrize("make", [lambda: TPGM(every_n_steps=1), SPD], ids=["tpgm", "spd"])
def test_cheap_memory_for_a_deviation_is_there_once_whatever_is_frozen_in_turns(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_tpgm.groups, "SHARED", 4)  # each of these tensors has memory of its own
    module = Scales(8, 4)
    optimizer = module.configure_optimizers()
    method, made, spare = make(), [], Layout.spare
    held_out = (lambda: module.training_step(torch.ones(1), 0)) if isinstance(method, TPGM) else None
    constraint = constrain(module, method, optimizer, held_out_loss=held_out)

    def noted(self: Layout) -> list[Tensor | None]:
        made.append(weakref.WeakSet(found := spare(self)))
        return found

    monkeypatch.setattr(Layout, "spare", noted)
    for step in range(20):
        for index, scale in enumerate(module.scales):
            scale.requires_grad_(index != step % 10)
        optimizer.zero_grad()
        module.training_step(torch.ones(1), 0).backward()
        optimizer.step()
        assert sum(tensor.numel() for tensors in made for tensor in tensors) <= 8 * 4
    assert len(made) > 10
    assert constraint.distances


def test_cheap_tensors_of_two_optimizers_keep_their_memory() -> None:
    spares, layout = Spares(), Layout([torch.zeros(2)], "l2")
    first, _ = (spares.of([name], layout) for name in "ab")
    assert spares.of(["a"], layout) is first


def test_cheap_the_weights_before_a_projection_are_kept_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    after = TPGM.after

    def noted(self: TPGM, tensors: Constrained, step: Step) -> None:
        after(self, tensors, step)
        seen.append([matrix.data_ptr() for matrix in tensors._spare if matrix is not None])

    monkeypatch.setattr(TPGM, "after", noted)
    monkeypatch.setattr(lightning_tpgm.groups, "SHARED", 4)
    callback = TPGMCallback(DataLoader(torch.ones(2, 1), 1))
    quiet_trainer(callback, max_steps=3, max_epochs=None).fit(Scales(2, 4), DataLoader(torch.ones(3, 1), 1))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 2
    assert callback._constraint.tensors is None
