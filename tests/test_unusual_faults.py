"""Faults that only unusual ways of training show."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
    constrain,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import FTP, TPGM
from properties import assert_inside_balls, assert_same
from toys import Blobs, Classifier, blobs, classifier_loss, trainer_in, weights_of


class Named(NamedTuple):
    x: Tensor
    y: Tensor


# --- tensors that the first step does not move ---


@pytest.mark.parametrize("every_n_steps", [1, 4])
@pytest.mark.parametrize("why", ["no gradient", "warm-up from 0"])
def test_a_radius_begins_with_the_first_step_that_moves_its_tensor(why: str, every_n_steps: int) -> None:
    """It would begin at 0, and hold the tensor at its anchor. What is learned begins then, too."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(5, 5) for name in "ab"})
    x, y = torch.randn(16, 5), 10 * torch.randn(16, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(parts: str = "ab") -> Tensor:
        return (sum(model[name](x) for name in parts) - y).square().mean()

    constraint = constrain(model, TPGM(every_n_steps=every_n_steps), optimizer, held_out_loss=loss)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.0 if why == "warm-up from 0" and step == 0 else 0.01
        optimizer.zero_grad()
        loss("a" if why == "no gradient" and step == 0 else "ab").backward()
        optimizer.step()
        if step == 0:
            assert math.isnan(constraint.radii["b.weight"])
            assert not constraint.method.radii.step.view(2, 2)[1].any()
        if step == 1:  # half of what Adam's first step goes along a row of five
            assert constraint.radii["b.weight"] >= 0.0249


def test_ftp_begins_although_something_fails_in_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory for instance: the next step is done as if it was the first."""
    model = nn.Linear(5, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constraint = constrain(model, FTP(), optimizer)

    def fail(*_: Any) -> Any:
        raise MemoryError

    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        with monkeypatch.context() as patch:
            if step == 0:
                patch.setattr(Constrained, "step_sums", fail)
            with pytest.raises(MemoryError) if step == 0 else nullcontext():
                optimizer.step()
    assert all(radius > 0 for radius in constraint.radii.values())


# --- batches that are views of their data ---

BATCHES: dict[str, Any] = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "named": Named,
    "nested": lambda x, y: [{"x": (x,)}, y],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_step_that_writes_to_its_batch_leaves_the_held_out_data_alone(kind: str, tmp_path: Path) -> None:
    x, y = blobs(16, seed=2)[:]
    before, written = x.clone(), []

    class Writes(Classifier):
        def loss(self, batch: Any) -> Tensor:
            x, y = tree_leaves(batch)
            x.add_(torch.randn_like(x)).requires_grad_()
            written.append(self.training)
            return super().loss((x, y))

    held_out = [BATCHES[kind](x[:8], y[:8]), BATCHES[kind](x[8:], y[8:])]
    callback = TPGMCallback(held_out, every_n_steps=1)
    trainer_in(tmp_path, callbacks=callback, max_epochs=1, limit_val_batches=0).fit(Writes(), Blobs())
    assert written == [True, False] * 4
    assert torch.equal(x, before)
    assert not any(part.requires_grad for part in tree_leaves(held_out))


def test_a_hook_that_transfers_batches_may_have_parameters(tmp_path: Path) -> None:
    """The loss depends on them by the batch."""

    class InHook(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = batch
            return self.backbone(x), y

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    found = []
    for module in (InHook(), Classifier()):
        callback, data = TPGMCallback(every_n_steps=1), Blobs()
        trainer = trainer_in(tmp_path, callbacks=callback, max_epochs=2)
        trainer.fit(module, data.train_dataloader(), data.val_dataloader())
        found.append((weights_of(module), callback.radii))
    assert_same(*found)


# --- optimizers that go up ---


class GoesUp(Classifier):
    """Its step returns what is to be raised."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.loss(batch)

    def configure_optimizers(self) -> Any:
        head = {"params": self.head.parameters(), "maximize": True}
        return torch.optim.SGD([head, {"params": self.backbone.parameters(), "maximize": True}], lr=0.1)


@pytest.mark.parametrize("make", [FTPCallback, DiGraPCallback, SPDCallback, L2SPCallback])
def test_an_optimizer_that_goes_up_is_refused_by_what_goes_by_its_gradients(
    make: type[MethodCallback], tmp_path: Path
) -> None:
    """The penalty of L2-SP would drive the weights away from the anchors, and FTP's radii would stay at their floor."""
    refused = rf"^{make.__name__} goes by a loss .* SGD has maximize=True\. Leave that out, and return the negative"
    with pytest.raises(MisconfigurationException, match=refused):
        trainer_in(tmp_path, callbacks=make(exclude=["head.*"]), max_epochs=1).fit(GoesUp(), Blobs())
    optimizer = GoesUp().configure_optimizers()
    module = nn.ModuleList(nn.ParameterList(group["params"]) for group in optimizer.param_groups)
    with pytest.raises(ValueError, match=r"has maximize=True"):
        constrain(module, make().make_method(), optimizer)
    assert not optimizer._optimizer_step_pre_hooks

    optimizer.param_groups[0]["maximize"] = False
    constrain(module, make().make_method(), optimizer, exclude=["1.*"])  # of what is not constrained it may


@pytest.mark.parametrize("when", ["training", "fit_end"])
def test_an_optimizer_that_goes_up_is_refused_where_radii_lower_what_it_raises(when: Any, tmp_path: Path) -> None:
    """They would all end at their floor."""
    with pytest.raises(MisconfigurationException, match="TPGMCallback goes by a loss that is lowered, and SGD has"):
        trainer_in(tmp_path, callbacks=TPGMCallback(when=when), max_epochs=1).fit(GoesUp(), Blobs())


def test_a_new_optimizer_that_goes_up_over_exchanged_parameters_is_refused(tmp_path: Path) -> None:
    class Turns(Exchanges):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, maximize=self.global_step > 0)

        def exchange(self) -> None:
            if self.global_step == self.step:
                for layer in (self.backbone[0], self.head):
                    layer.weight, layer.bias = nn.Parameter(layer.weight.data), nn.Parameter(layer.bias.data)
                self.trainer.strategy.setup_optimizers(self.trainer)

    with pytest.raises(MisconfigurationException, match="FTPCallback goes by a loss"):
        trainer_in(tmp_path, callbacks=FTPCallback(), max_epochs=2).fit(Turns(4, False), Blobs())


@pytest.mark.parametrize("make", [AnchorDecayCallback, lambda: TPGMCallback(loss=classifier_loss)])
def test_an_optimizer_that_goes_up_is_as_good_for_what_does_not(make: Any, tmp_path: Path) -> None:
    found = []
    for module in (GoesUp(), Classifier()):
        trainer_in(tmp_path, callbacks=make(), max_epochs=1).fit(module, Blobs())
        found.append(weights_of(module))
    assert_same(*found)


# --- parameters that are exchanged ---


class Exchanges(Classifier):
    """Puts another parameter of the same value in the place of one at a step, with an optimizer that knows it."""

    def __init__(self, step: int, frozen: bool) -> None:
        super().__init__()
        self.step = step
        self.backbone.requires_grad_(not frozen)

    def exchange(self) -> None:
        if self.global_step == self.step:
            old = self.backbone[0].weight
            self.backbone[0].weight = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_epoch_start(self) -> None:
        self.exchange()
        if self.current_epoch == 2:
            self.backbone.requires_grad_(True)


METHODS = {
    "TPGM": lambda: TPGMCallback(every_n_steps=1),
    "TPGM at the end": lambda: TPGMCallback(when="fit_end", radius_steps=3),
    **{make.__name__: make for make in (FTPCallback, DiGraPCallback, SPDCallback, L2SPCallback, WiSEFTCallback)},
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_is_exchanged_is_constrained(method: str, step: int, frozen: bool, tmp_path: Path) -> None:
    """Its name is what stays: the run is the one in which nothing is exchanged."""
    found = []
    for at in (step, -1):
        module, callback = Exchanges(at, frozen), METHODS[method]()
        trainer_in(tmp_path, callbacks=callback, max_epochs=4).fit(module, Blobs())
        found.append((weights_of(module), callback.anchor))
    assert_same(*found)


def test_a_parameter_that_is_tied_to_another_one_counts_once(tmp_path: Path) -> None:
    """It stays in the ball of its first name; that of the other name is the ball of what is no more in the module."""

    class Ties(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def loss(self, batch: Any) -> Tensor:
            first, second = self.layers
            return super().loss(batch) + second(first(torch.ones(1, 3))).square().sum()

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.layers[1].weight = self.layers[0].weight

    module, callback = Ties(), TPGMCallback(every_n_steps=1)
    trainer_in(tmp_path, callbacks=callback, max_epochs=3).fit(module, Blobs())
    assert "layers.1.weight" not in dict(module.named_parameters())
    del (radii := callback.radii)["layers.1.weight"]
    assert_inside_balls(module, callback.anchor, radii)
