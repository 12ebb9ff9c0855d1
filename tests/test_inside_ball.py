"""Invariant 3, "Inside the ball": whoever looks at the weights after an optimizer step sees them inside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tpgm import TPGMCallback
from properties import assert_distances, assert_inside_ball
from toys import SaveOnException, Toy, adamw, quiet_trainer, toy, train_loader, val_loader

Look = Callable[[str], None]

CALLBACK_HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_exception",
    "on_train_end",
    "on_fit_end",
]
MODULE_HOOKS = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_train_end",
]


def watcher(look: Look, place: str) -> pl.Callback:
    """A callback that looks in every hook."""

    def hook(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: look(f"{place} {name}")

    return type("Watcher", (pl.Callback,), {name: hook(name) for name in CALLBACK_HOOKS})()


class WatchedToy(Toy):
    """Looks in its own hooks, in its steps (also when they are evaluated on held-out data), and after the optimizer."""

    look: Look

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.look("module training_step" if self.training else "module held-out step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.look("module validation_step")
        return super().validation_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.look("module optimizer_step")


def module_hook(name: str) -> Callable[..., None]:
    def look_and_go_on(self: WatchedToy, *args: Any, **kwargs: Any) -> None:
        getattr(Toy, name)(self, *args, **kwargs)
        self.look(f"module {name}")

    return look_and_go_on


for _name in MODULE_HOOKS:
    setattr(WatchedToy, _name, module_hook(_name))


def watch(callback: TPGMCallback, module: pl.LightningModule) -> tuple[Look, Counter[str]]:
    """A function that asserts invariant 3, and how often it was called with radii in force, by place."""
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    seen: Counter[str] = Counter()

    def look(place: str) -> None:
        radii = callback.radii
        if all(radius != radius for radius in radii.values()):  # before the first step
            return
        seen[place] += 1
        anchors = {name: start[name].to(parameter.dtype) for name, parameter in module.named_parameters()}
        try:
            assert_inside_ball(module, {name: anchors[name] for name in radii}, radii, callback.norm)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from None

    return look, seen


def watched(optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> WatchedToy:
    module = WatchedToy(optimizer)
    module.load_state_dict(toy().state_dict())
    return module


SETTINGS = {
    "mars": {},
    "l2": {"norm": "l2"},
    "radius_steps": {"radius_steps": 3},
    "every_n_steps": {"every_n_steps": 3},
    "l2, every_n_steps": {"norm": "l2", "every_n_steps": 2, "radius_steps": 2},
    "fast radii": {"radius_lr": 3.0},
    "excluded head": {"exclude": ["head.*"]},
}


@pytest.mark.parametrize(
    ("setting", "optimizer"), [*((setting, None) for setting in SETTINGS), ("mars", adamw), ("l2", adamw)]
)
def test_inside_ball_whoever_looks(setting: str, optimizer: Any) -> None:
    module = watched(optimizer)
    callback = TPGMCallback(**SETTINGS[setting])
    look, seen = watch(callback, module)
    module.look = look
    callbacks = [watcher(look, "before"), callback, watcher(look, "after")]
    quiet_trainer(*callbacks, max_epochs=2).fit(module, train_loader(), val_loader())

    excluded = {"head.weight", "head.bias"} if "exclude" in SETTINGS[setting] else set()
    assert set(callback.radii) == {name for name, _ in module.named_parameters()} - excluded
    unseen = {"on_save_checkpoint", "on_exception"}
    expected = {f"{place} {name}" for place in ("before", "after") for name in CALLBACK_HOOKS if name not in unseen}
    expected |= {f"module {name}" for name in MODULE_HOOKS}
    expected |= {f"module {name}" for name in ("training_step", "validation_step", "optimizer_step", "held-out step")}
    assert set(seen) == expected
    # both batches' ends of 2 epochs of 6 steps, the first step included
    assert seen["before on_train_batch_end"] == seen["after on_train_batch_end"] == seen["module optimizer_step"] == 12


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_inside_ball_in_each_precision(precision: str, norm: str) -> None:
    module = watched()
    callback = TPGMCallback(norm=norm, radius_steps=2)
    look, seen = watch(callback, module)
    module.look = look
    trainer = quiet_trainer(callback, watcher(look, "after"), max_epochs=2, precision=precision)
    trainer.fit(module, train_loader(), val_loader())
    assert seen["after on_train_batch_end"] == 12


def test_inside_ball_in_every_checkpoint(tmp_path: Path) -> None:
    """Each file is consistent in itself: its weights are inside the balls of its anchors and radii."""
    module, callback = toy(), TPGMCallback()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet_trainer(saver, callback, max_epochs=2, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 12
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        state = checkpoint["callbacks"][callback.state_key]
        radii = dict(zip(state["method"]["radii"]["names"], state["method"]["radii"]["value"].tolist(), strict=True))
        assert {name for name, radius in radii.items() if math.isnan(radius)} <= {"backbone.0.bias"}  # before a norm
        assert len(radii) == 11
        assert_inside_ball(checkpoint["state_dict"], state["anchor"], radii, callback.norm)


def test_inside_ball_with_accumulation() -> None:
    """Between two steps the weights stand still inside; the last batch of the epoch steps early."""
    module = watched()
    callback = TPGMCallback()
    look, seen = watch(callback, module)
    module.look = look
    trainer = quiet_trainer(callback, watcher(look, "after"), accumulate_grad_batches=4, max_epochs=2)
    trainer.fit(module, train_loader(), val_loader())
    assert seen["module optimizer_step"] == 4


class TwoOptimizers(WatchedToy):
    """Manual optimization: one optimizer for the head, one for the rest, each looked at right after its step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        rest = [p for name, p in self.named_parameters() if not name.startswith("head")]
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.Adam(rest, lr=0.05)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.look(f"optimizer {i}")


def test_inside_ball_after_each_of_several_optimizers() -> None:
    module = TwoOptimizers()
    callback = TPGMCallback(loss=lambda module, batch: module.loss(batch))
    look, seen = watch(callback, module)
    module.look = look
    quiet_trainer(callback).fit(module, train_loader(), val_loader())
    assert seen["optimizer 0"] == seen["optimizer 1"] == 6


# --- when the held-out evaluation fails in the middle of an update


class Broken(Exception):
    pass


def failing_loss(fail_at: int, where: str, exception: BaseException) -> Callable[[pl.LightningModule, Any], Tensor]:
    """A loss that raises in its n-th evaluation: in the forward pass or in the backward pass."""
    calls = 0

    def fail(*_: Any) -> None:
        raise exception

    def loss(module: pl.LightningModule, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        output = module(batch[0])
        if calls == fail_at:
            if where == "forward":
                fail()
            output.register_hook(fail)
        return nn.functional.mse_loss(output, batch[1])

    return loss


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fail_at", [1, 2, 5, 6], ids=lambda n: f"evaluation{n}")
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_inside_ball_when_the_evaluation_raises(where: str, fail_at: int, norm: str, tmp_path: Path) -> None:
    """In the first and the last of three evaluations of a step: the module and the file written then are inside."""
    module = toy()
    callback = TPGMCallback(norm=norm, radius_steps=3, loss=failing_loss(fail_at, where, Broken()))
    look, seen = watch(callback, module)
    save = SaveOnException(tmp_path / "saved.ckpt")
    with pytest.raises(MisconfigurationException, match="Broken"):  # with likely causes
        quiet_trainer(save, callback, watcher(look, "after"), enable_checkpointing=True).fit(
            module, train_loader(), val_loader()
        )
    look("after fit")
    start = {name: parameter.detach() for name, parameter in toy().named_parameters()}
    assert_distances(module, start, callback.distances, norm)  # of the last projection, the one after the exception
    assert seen["after on_exception"] == seen["after on_save_checkpoint"] == seen["after fit"] == 1
    saved = torch.load(save.path, weights_only=True)
    state = saved["callbacks"][callback.state_key]
    assert_inside_ball(saved["state_dict"], state["anchor"], callback.radii, norm)
    saved_radii = torch.tensor(list(callback.radii.values()))
    torch.testing.assert_close(state["method"]["radii"]["value"], saved_radii, rtol=0, atol=0, equal_nan=True)
