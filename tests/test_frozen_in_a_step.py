"""Layers that freeze and thaw within a step: what counts is what the optimizer moves, once the gradients are there."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import (
    AnchorDecayCallback,
    Constraint,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    constrain,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import FTP, L2SP, SPD, TPGM, AnchorDecay, DiGraP, Method, Step
from properties import assert_inside_balls, assert_same
from toys import quiet_trainer

METHODS: dict[str, Callable[[], Method]] = {
    "TPGM": partial(TPGM, every_n_steps=1),
    "FTP": FTP,
    "SPD": SPD,
    "DiGraP": partial(DiGraP, 0.3),
    "L2-SP": partial(L2SP, 0.5),
    "AnchorDecay": partial(AnchorDecay, 0.5),
}
CALLBACKS: dict[str, Callable[..., MethodCallback]] = {
    "TPGM": partial(TPGMCallback, lambda: data(1), every_n_steps=1, loss=lambda module, batch: module.loss(batch)),
    "FTP": FTPCallback,
    "SPD": SPDCallback,
    "DiGraP": partial(DiGraPCallback, 0.3),
    "L2-SP": partial(L2SPCallback, 0.5),
    "AnchorDecay": partial(AnchorDecayCallback, 0.5),
}
Switch = Callable[["Twins", int], None]  # gets the number of steps that were taken


class Twins(pl.LightningModule):
    """Two layers of one shape.

    Args:
        switch: Freezes and thaws.
        hook: Where that happens.
    """

    def __init__(self, switch: Switch = lambda module, step: None, hook: str = "on_train_batch_start") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.switch, self.hook = switch, hook

    def at(self, hook: str) -> None:
        if hook == self.hook:
            self.switch(self, self.global_step)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.at("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at("training_step")
        return self.loss(batch)

    def on_after_backward(self) -> None:
        self.at("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.at("on_before_optimizer_step")

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


def data(seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(48, size, generator=generator) for size in (4, 2))
    return DataLoader(TensorDataset(x, y), 4)


def in_turn(module: Twins, step: int) -> None:
    """At first both are trained, later one at a time."""
    module.a.requires_grad_(step < 2 or step % 2 == 0)
    module.b.requires_grad_(step < 2 or step % 2 == 1)


def thaws(module: Twins, step: int) -> None:
    module.a.requires_grad_(step >= 3)


def fitted(name: str, switch: Switch, hook: str, scaler: bool = False, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A callback and the weights after twelve steps."""
    module, callback = Twins(switch, hook), CALLBACKS[name](exclude=["head.*"], **options)
    module.a.requires_grad_(switch is not thaws)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    trainer = quiet_trainer(callback, plugins=[plugin] if scaler else [])
    trainer.fit(module, data())
    return callback, {name: weight.detach().clone() for name, weight in module.named_parameters()}


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("switch", [in_turn, thaws])
@pytest.mark.parametrize("name", CALLBACKS)
def test_within_the_training_step_is_before_it(name: str, switch: Switch, scaler: bool) -> None:
    """Lightning runs it within the optimizer's step."""
    callback, weights = fitted(name, switch, "training_step", scaler)
    expected, expected_weights = fitted(name, switch, "on_train_batch_start", scaler)
    assert_same(weights, expected_weights)
    start = {n: w.detach() for n, w in Twins().named_parameters() if "head" not in n}
    assert_same({n: callback.anchor[n] for n in start}, start)
    assert_same(callback.report(), expected.report())


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_layer_that_thaws_is_bound_to_the_given_weights(name: str) -> None:
    given = Twins().requires_grad_(False)
    with torch.no_grad():
        given.a.weight.add_(0.1)
    (callback, weights), (_, expected) = (
        fitted(name, thaws, hook, pretrained=given) for hook in ("training_step", "on_train_batch_start")
    )
    assert_same(callback.anchor["a.weight"], given.a.weight.detach())
    assert_same(weights, expected)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name not in ("L2-SP", "AnchorDecay")])
def test_a_layer_that_freezes_with_its_gradient_is_stepped_all_the_same(name: str) -> None:
    """It has left autograd's hands, and the optimizer asks for the gradient alone."""

    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            pl_module.requires_grad_(True)

    found = []
    for freezes in (True, False):
        module = Twins(lambda module, step, freezes=freezes: module.a.requires_grad_(not freezes), "on_after_backward")
        callback = CALLBACKS[name](exclude=["head.*"])
        quiet_trainer(callback, Thaw()).fit(module, data())
        found.append({name: weight.detach().clone() for name, weight in module.named_parameters()})
        if isinstance(callback, TPGMCallback | FTPCallback):
            assert_inside_balls(module, callback.anchor, callback.radii)
    if name != "TPGM":  # which learns no radius of a frozen layer
        assert_same(*found)


@pytest.mark.parametrize("scaler", [False, True])
def test_digrap_where_a_layer_thaws_after_the_gradients_were_changed(scaler: bool) -> None:
    """It has no gradient yet: it is constrained from its first one on."""
    callback, weights = fitted("DiGraP", thaws, "on_before_optimizer_step", scaler)
    start = Twins().a.weight.detach()
    assert_same(callback.anchor["a.weight"], start)
    assert not torch.equal(weights["a.weight"], start)


# --- plain loops ---


class Loop:
    """Steps of a closure, in which ``switch`` gets the model and the number of the step."""

    def __init__(self, name: str, model: Twins | None = None, **options: Any) -> None:
        self.model = Twins() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.5)
        method, self.batches = METHODS[name](), [*data()]
        if isinstance(method, TPGM):
            options["held_out_loss"] = lambda: self.model.loss(self.batches[-1])
        self.constraint: Constraint = constrain(self.model, method, self.optimizer, exclude=["head.*"], **options)
        self.steps = 0

    def step(self, within: Switch = lambda model, step: None, before: Switch = lambda model, step: None) -> None:
        def closure() -> Tensor:
            within(self.model, self.steps)
            self.optimizer.zero_grad()
            loss = self.model.loss(self.batches[self.steps])
            loss.backward()
            return loss

        before(self.model, self.steps)
        self.optimizer.step(closure)
        self.steps += 1

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}


@pytest.mark.parametrize("switch", [in_turn, thaws])
@pytest.mark.parametrize("name", METHODS)
def test_within_a_closure_is_before_it(name: str, switch: Switch) -> None:
    loops = []
    for _ in range(2):
        model = Twins()
        model.a.requires_grad_(switch is not thaws)
        loops.append(Loop(name, model))
    for _ in range(8):
        loops[0].step(within=switch)
        loops[1].step(before=switch)
    assert_same(*(loop.weights() for loop in loops))
    assert_same(*(loop.constraint.state_dict()["anchor"] for loop in loops))
    assert_same(*(loop.constraint.report() for loop in loops))


def test_a_layer_that_was_never_seen_to_be_trainable_is_constrained_when_it_is_stepped() -> None:
    """It thaws for the backward pass alone."""
    model = Twins()
    model.a.requires_grad_(False)
    loop = Loop("FTP", model)

    def closure() -> None:
        model.a.requires_grad_(True)
        model.loss(loop.batches[0]).backward()
        model.a.requires_grad_(False)

    loop.optimizer.step(closure)  # type: ignore[arg-type]
    assert_same(loop.constraint.anchor["a.weight"], Twins().a.weight.detach())
    assert_inside_balls(model, loop.constraint.anchor, loop.constraint.radii)


@pytest.mark.parametrize("frozen", [["a"], ["a", "b"]])
@pytest.mark.parametrize("name", ["TPGM", "FTP"])
def test_momentum_of_a_frozen_layer_does_not_leave_the_ball(name: str, frozen: list[str]) -> None:
    """Its gradients are zeros instead of None."""
    loop = Loop(name)
    model, optimizer = loop.model, loop.optimizer
    for i in range(10):
        if i == 5:
            held = loop.weights()
            for layer in frozen:
                model.get_submodule(layer).requires_grad_(False)
        optimizer.zero_grad(set_to_none=False)
        model.loss(loop.batches[i]).backward()
        optimizer.step()
        assert_inside_balls(model, loop.constraint.anchor, loop.constraint.radii)
    assert not torch.equal(model.a.weight, held["a.weight"])


def test_before_is_before_an_optimizer_that_calls_its_closure_elsewhere() -> None:
    """As sharpness-aware minimization does, which goes uphill first."""

    class Uphill(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            grads = [p.grad.clone() for p in weights]
            with torch.no_grad():
                torch._foreach_add_(weights, grads)
                with torch.enable_grad():
                    closure()
                torch._foreach_sub_(weights, grads)
            super().step()

    class Probe(Method):
        def before(self, tensors: Constrained, step: Step) -> None:
            seen.append([p.detach().clone() for p in tensors.parameters])

    seen, model, batch = list[list[Tensor]](), Twins(), next(iter(data()))
    optimizer = Uphill(model.parameters(), lr=0.1)
    constrain(model, Probe(), optimizer)
    model.loss(batch).backward()
    held = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: model.loss(batch).backward())
    assert_same(seen, [held])


# --- back to an earlier state ---


@pytest.mark.parametrize("name", METHODS)
def test_back_to_a_state_from_before_a_thaw(name: str) -> None:
    """Then the same steps follow to the bit; and forward again to a state from after it."""
    model = Twins()
    model.a.requires_grad_(False)
    loop = Loop(name, model)
    parts = {"model": loop.model, "optimizer": loop.optimizer, "constraint": loop.constraint}
    states = []
    for thawed in (False, True):
        model.a.requires_grad_(thawed)
        loop.step()
        loop.step()
        states.append({part: copy.deepcopy(found.state_dict()) for part, found in parts.items()})
    ends = []
    for at, state in [(1, states[1]), (0, states[0]), (0, states[0]), (1, states[1])]:
        model.a.requires_grad_(at == 1)
        loop.steps = 2 * (at + 1)
        for part, found in parts.items():
            found.load_state_dict(copy.deepcopy(state[part]))  # type: ignore[attr-defined]
        assert_same(loop.constraint.state_dict()["anchor"], state["constraint"]["anchor"])
        model.a.requires_grad_(True)
        for _ in range(2):
            loop.step()
        ends.append(loop.weights())
    assert_same(ends[0], ends[3])
    assert_same(ends[1], ends[2])


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_goes_back_to_a_checkpoint_from_before_a_thaw(name: str, tmp_path: Any) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    def second_epoch(module: Twins, step: int) -> None:
        module.a.requires_grad_(step >= 12)

    path, callback = tmp_path / "before.ckpt", CALLBACKS[name](exclude=["head.*"])
    module = Twins(second_epoch)
    module.a.requires_grad_(False)
    trainer = quiet_trainer(callback, Save(), max_epochs=2)
    trainer.fit(module, data())
    weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    report = callback.report()
    trainer.fit(module, data(), ckpt_path=path)
    assert_same({name: weight.detach() for name, weight in module.named_parameters()}, weights)
    assert_same(callback.report(), report)


# --- rates that an optimizer keeps to itself ---


class Adaptive(Optimizer):
    """Chooses its rate by itself."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Does nothing."""


@pytest.mark.parametrize("defaults", [{"lr": None}, {}])
@pytest.mark.parametrize("name", ["DiGraP", "AnchorDecay"])
def test_a_group_without_a_rate(name: str, defaults: dict[str, Any]) -> None:
    model = Twins()
    optimizer = Adaptive(model.parameters(), defaults)
    constrain(model, METHODS[name](), optimizer)
    model.loss(next(iter(data()))).backward()
    expected = (
        "`lr` should be a number in every parameter group of Adaptive, found None. The method goes by the rate that"
        " each tensor is stepped with. Pass one to Adaptive (Adafactor: with relative_step=False)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        optimizer.step()


@pytest.mark.parametrize("name", ["L2-SP", "AnchorDecay", "DiGraP", "SPD", "FTP"])
def test_no_method_moves_a_frozen_layer_whose_gradients_are_zeros(name: str) -> None:
    """As ``zero_grad(set_to_none=False)`` leaves them. Without momentum torch does not move it either."""
    torch.manual_seed(0)
    module = Twins()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    constrain(module, METHODS[name](), optimizer)
    for step in range(8):
        if step == 4:
            module.a.requires_grad_(False)
            held = copy.deepcopy(module.a.state_dict())
        optimizer.zero_grad(set_to_none=False)
        module.loss((x, y)).backward()
        optimizer.step()
    assert_same(module.a.state_dict(), held)


class Twice(torch.optim.SGD):
    """Steps, calls its closure, steps and calls it again."""

    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            with torch.enable_grad():
                loss = closure()
            super().step()
        return loss


def test_what_a_step_moves_is_settled_at_the_first_call_of_its_closure() -> None:
    """Weights have moved at the second: the state before the step cannot be had any more."""
    module = Twins()
    module.b.requires_grad_(False)
    optimizer = Twice(module.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    method, seen = SPD(), []
    constraint = constrain(module, method, optimizer)
    before = method.before

    def spy(tensors: Constrained, step: Step) -> None:
        seen.append(copy.deepcopy(module.a.weight.data))
        before(tensors, step)

    method.before = spy  # type: ignore[method-assign]
    for _ in range(2):
        start, calls = copy.deepcopy(module.a.weight.data), 0
        seen.clear()

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            module.b.requires_grad_(calls == 2)
            optimizer.zero_grad()
            loss = module.loss((x, y))
            loss.backward()
            return loss

        optimizer.step(closure)
        assert seen
        assert all(torch.equal(weight, start) for weight in seen)
    assert set(constraint.anchor) == set(dict(Twins().named_parameters()))
