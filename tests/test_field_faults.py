"""Faults from the field: each test is the smallest instance of a kind that once ended in a silent wrong result."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_tpgm import (
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
    constrain,
    project_checkpoint,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.methods import FTP, SPD
from properties import assert_inside_ball, assert_same
from test_contract import METHODS, Method
from toys import ByHand, Sharp, Toy, quiet_trainer, sgd, toy, train_loader, val_loader, weights_of


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> None:
    torch.manual_seed(0)
    quiet_trainer(*callbacks, **options).fit(module, train_loader(), val_loader())


# --- weights that come after the anchors were taken


def load(module: Toy) -> None:
    module.load_state_dict(toy(5).state_dict())


def load_by_data(module: Toy) -> None:
    """Neither the parameters' versions nor their addresses show it."""
    pairs = zip(module.state_dict().values(), toy(5).state_dict().values(), strict=True)
    for mine, theirs in pairs:
        mine.data.copy_(theirs)


HOOKS = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "training_step")


def test_weights_loaded_in_the_modules_on_train_start_are_the_anchors(method: Method) -> None:
    assert_late_weights_are_the_anchors("on_train_start", load, method.make)


@pytest.mark.parametrize("how", [load, load_by_data])
@pytest.mark.parametrize("hook", HOOKS)
def test_weights_loaded_in_the_modules_own_hooks_are_the_anchors(hook: str, how: Any) -> None:
    assert_late_weights_are_the_anchors(hook, how, TPGMCallback)


def test_weights_loaded_before_the_step_of_a_bare_optimizer_are_the_anchors() -> None:
    """Lightning announces no such step."""

    class Manual(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 0 and batch_idx == 0:
                load(self)
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

    callback, start = TPGMCallback(loss="validation_step"), toy(5).state_dict()
    fit(Manual(), callback)
    assert_same(callback.anchor, {name: start[name] for name in callback.anchor})


@pytest.mark.parametrize("make", [FTPCallback, SPDCallback, L2SPCallback])
def test_weights_that_a_closure_in_manual_optimization_is_called_at_are_no_anchors(make: type[MethodCallback]) -> None:
    """Those before the step are, loaded in the training step."""

    class Loads(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                load(self)
            super().training_step(batch, batch_idx)

    callback, start = make(), toy(5).state_dict()
    fit(Loads(lambda parameters: Sharp(parameters, lr=0.01)), callback)
    assert_same(callback.anchor, {name: start[name] for name in callback.anchor})


def assert_late_weights_are_the_anchors(hook: str, how: Any, make: Any) -> None:
    """The module's hooks run after those of callbacks."""

    class LoadsLate(Toy):
        loaded = False

    def late(self: Any, *args: Any) -> Any:
        if not self.loaded:
            self.loaded = True
            how(self)
        return getattr(super(LoadsLate, self), hook)(*args)

    setattr(LoadsLate, hook, late)
    module, callback, expected = LoadsLate(), make(), toy(5)
    fit(module, callback)
    start = toy(5).state_dict()
    assert_same(callback.anchor, {name: start[name] for name in callback.anchor})
    fit(expected, make())
    assert_same(module.state_dict(), expected.state_dict())


def test_a_second_fit_keeps_the_anchors_whatever_the_module_writes_then() -> None:
    class Writes(Toy):
        def on_train_start(self) -> None:
            with torch.no_grad():
                self.head.bias.zero_()

    module, callback = Writes(), FTPCallback()
    trainer = quiet_trainer(callback)
    trainer.fit(module, train_loader(), val_loader())
    first = {name: value.clone() for name, value in callback.anchor.items()}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_loader(), val_loader())
    assert_same(callback.anchor, first)


# --- optimizers


class Averaging(torch.optim.SGD):
    """Evaluates other weights than it trains, as schedule-free optimizers do."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, SPDCallback])
def test_optimizer_that_evaluates_other_weights_is_refused(make: type[MethodCallback]) -> None:
    def averaging(parameters: Any) -> torch.optim.Optimizer:
        return Averaging(parameters, lr=0.1)

    with pytest.raises(
        MisconfigurationException, match=rf"^{make.__name__} keeps .* Averaging evaluates others: its eval"
    ):
        fit(toy(0, averaging), make())
    fit(toy(0, averaging), L2SPCallback())  # changes gradients alone
    fit(toy(0, averaging), TPGMCallback(when="fit_end"))
    linear = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"^SPD keeps .* Averaging evaluates others"):
        constrain(linear, SPD(), Averaging(linear.parameters(), lr=0.1))


class WithoutHooks(torch.optim.SGD):
    """A wrapper that forgot the constructor of its base class."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state


def test_optimizer_without_hooks_is_refused_by_name() -> None:
    linear = nn.Linear(2, 2)
    optimizer = WithoutHooks(torch.optim.SGD(linear.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"^WithoutHooks has no hooks on its step.* call super\(\).__init__"):
        constrain(linear, SPD(), optimizer)


class Delegates(torch.optim.Optimizer):
    """A wrapper that forgot the constructor of its base class, and has the inner one's groups and state."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Forwards(Delegates):
    """Whatever it has not is the inner one's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)


class Stranger:
    """No torch optimizer; calls the closure itself."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = [inner]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"][0], name)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.inner[0].step()
        return loss


class Copies(Delegates):
    """Has all attributes of the inner one."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        vars(self).update(vars(inner), inner=inner)


class HooksOfItsOwn(Delegates):
    """Has hooks, which nothing calls before the first call of torch's `zero_grad`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


WRAPPERS = [Delegates, Forwards, Stranger, Copies, HooksOfItsOwn, lambda inner: Delegates(Forwards(inner))]


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, DiGraPCallback, SPDCallback, L2SPCallback])
def test_wrapper_of_an_optimizer_does_what_that_does(make: type[MethodCallback]) -> None:
    runs = []
    for wrap in (lambda inner: inner, *WRAPPERS):
        torch.manual_seed(0)
        module, callback = toy(0, lambda parameters, wrap=wrap: wrap(sgd(parameters))), make()  # type: ignore[misc]
        fit(module, callback)
        runs.append(weights_of(module))
    for run in runs[1:]:
        assert_same(run, runs[0])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapper_of_an_optimizer_in_a_plain_loop(wrap: Any) -> None:
    linear = nn.Linear(2, 2)
    start = {name: p.detach().clone() for name, p in linear.named_parameters()}
    optimizer = wrap(torch.optim.SGD(linear.parameters(), lr=0.5))
    constraint = constrain(linear, FTP(), optimizer)
    for _ in range(3):
        linear(torch.ones(4, 2)).square().mean().backward()
        optimizer.step()
        assert_inside_ball(linear, start, constraint.radii, "mars")
    assert constraint.state_dict()["method"]["radii"]["step"].any()


def test_wrapper_that_holds_what_its_wrapper_holds() -> None:
    linear = nn.Linear(2, 2)
    inner = torch.optim.SGD(linear.parameters(), lr=0.1)
    optimizer = Delegates(Forwards(inner))
    optimizer.innermost = inner  # type: ignore[attr-defined]
    assert constrain(linear, SPD(), optimizer).steps.optimizers == [inner]


def test_wrapper_of_two_optimizers_is_refused_by_name() -> None:
    linear = nn.Linear(2, 2)
    optimizer = Delegates(torch.optim.SGD(linear.parameters(), lr=0.1))
    optimizer.other = torch.optim.SGD(linear.parameters(), lr=0.1)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"^Delegates has no hooks on its step.* call super\(\).__init__"):
        constrain(linear, SPD(), optimizer)


def test_wrapper_that_holds_itself_is_refused_by_name() -> None:
    class Knows:
        def __init__(self, parameters: Any) -> None:
            self.param_groups, self.me = [{"params": [*parameters]}], [self]

        def step(self) -> None:
            pass

    linear = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"^Knows has no hooks on its step"):
        constrain(linear, SPD(), Knows(linear.parameters()))  # type: ignore[arg-type]


class Around(torch.optim.Optimizer):
    """A wrapper with hooks of its own that hides the modes of what it wraps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = {"first": inner}
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner["first"].step(closure)


@pytest.mark.parametrize("wrap", [*WRAPPERS, Around, lambda inner: Around(Delegates(inner))])
def test_wrapper_of_one_that_evaluates_other_weights_is_refused(wrap: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"^FTPCallback keeps .* evaluates others: its eval"):
        fit(toy(0, lambda parameters: wrap(Averaging(parameters, lr=0.1))), FTPCallback())
    linear = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"^SPD keeps .* evaluates others: its eval"):
        constrain(linear, SPD(), wrap(Averaging(linear.parameters(), lr=0.1)))
    fit(toy(0, lambda parameters: wrap(Averaging(parameters, lr=0.1))), L2SPCallback())


# --- numbers that are not finite


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_one_gradient_that_is_not_finite_does_not_stay(value: float) -> None:
    """An optimizer may survive it, by its sign for instance; a radius that took it in would be lost for good."""

    class Sign(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(p.grad.nan_to_num(0).sign(), alpha=0.01)

    torch.manual_seed(0)
    linear, x = nn.Linear(3, 2), torch.randn(8, 3)
    start = {name: p.detach().clone() for name, p in linear.named_parameters()}
    optimizer = Sign(linear.parameters(), lr=0.01)
    constraint = constrain(linear, FTP(), optimizer)
    for step in range(6):
        optimizer.zero_grad()
        linear(x).square().mean().backward()
        if step == 3:
            linear.weight.grad[0, 0] = value
        optimizer.step()
        assert all(radius == radius for radius in constraint.radii.values())
        assert_inside_ball(linear, start, constraint.radii, "mars")


def test_a_step_that_is_undone_does_not_stay_in_what_is_shown() -> None:
    """Guards against steps that are not finite put the earlier weights back."""
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    constraint = constrain(linear, FTP(), optimizer)
    for step in range(4):
        kept = {name: value.clone() for name, value in linear.state_dict().items()}
        optimizer.zero_grad()
        (linear(torch.ones(4, 3)).square().mean() * (torch.nan if step == 1 else 1)).backward()
        optimizer.step()
        if step == 1:
            linear.load_state_dict(kept)
    for row in constraint.report():
        assert row["wanted"] == row["wanted"]
        assert row["allowed"] == row["allowed"]
    vectors = constraint.state_dict()["method"]["radii"]
    assert all(vectors[name].isfinite().all() for name in ("value", "exp_avg", "exp_avg_sq"))


# --- arguments


def test_numpys_numbers_are_numbers() -> None:
    callback = TPGMCallback(radius_lr=np.float32(0.5), radius_steps=np.int64(2), every_n_steps=np.int64(3))
    assert (callback.radius_lr, callback.radius_steps, callback.every_n_steps) == (0.5, 2, 3)
    assert type(callback.radius_lr) is float
    assert "np." not in repr(callback)


@pytest.mark.parametrize("value", [True, False])
def test_numpys_truth_values_are_truth_values(value: bool, tmp_path: Path) -> None:
    path, _ = checkpoints(tmp_path)
    flags = dict.fromkeys(["summary", "save_anchor", "eval_mode"], np.bool_(value))
    callback = TPGMCallback(pretrained=path, **flags)  # type: ignore[arg-type]
    assert all(getattr(callback, name) is value for name in flags)
    module = toy()
    constraint = constrain(
        module, SPD(), module.configure_optimizers(), pretrained=path, save_anchor=flags["save_anchor"]
    )
    assert ("file" in constraint.state_dict()) != value
    with pytest.raises(MisconfigurationException, match=r"^`radius_lr` should be a positive number or 'auto', found"):
        TPGMCallback(radius_lr=np.bool_(value))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["yes", 1, None, np.int64(1), np.array([True]), torch.tensor(True)])
def test_summary_is_a_truth_value(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"^`summary` should be True or False, found"):
        SPDCallback(summary=value)


# --- files


def checkpoints(folder: Path) -> tuple[Path, Path]:
    torch.save(toy(0).state_dict(), folder / "pretrained.pt")
    torch.save(toy(1).state_dict(), folder / "finetuned.pt")
    return folder / "pretrained.pt", folder / "finetuned.pt"


def test_interrupted_writing_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output is the fine-tuned file itself."""
    pretrained, finetuned = checkpoints(tmp_path)
    before = finetuned.read_bytes()
    save = torch.save

    def full_disk(content: Any, path: Path) -> None:
        save(content, path)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        project_checkpoint(
            toy(), pretrained, finetuned, val_loader(), finetuned, radius_steps=1, trainer=quiet_trainer()
        )
    assert finetuned.read_bytes() == before
    monkeypatch.undo()
    project_checkpoint(toy(), pretrained, finetuned, val_loader(), finetuned, radius_steps=1, trainer=quiet_trainer())
    assert finetuned.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetuned.pt", "pretrained.pt"]


def test_projecting_a_file_onto_itself_is_an_error(tmp_path: Path) -> None:
    _, finetuned = checkpoints(tmp_path)
    with pytest.raises(
        MisconfigurationException, match=r"^`pretrained` and `finetuned` should be two files, found .* twice"
    ):
        project_checkpoint(toy(), str(finetuned), finetuned, val_loader())


def test_buffers_of_a_frozen_layer_are_left_alone_at_the_end() -> None:
    """WiSE-FT interpolates running statistics, too, but not those of a layer that was frozen meanwhile."""

    class Freezes(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.backbone[1].requires_grad_(False).eval()

    def running_mean(*callbacks: pl.Callback) -> Any:
        module = toy()
        fit(module, Freezes(), *callbacks)
        return module.backbone[1].running_mean

    plain = running_mean()
    assert not torch.equal(plain, torch.zeros(3))
    assert torch.equal(running_mean(WiSEFTCallback(alpha=0.5)), plain)
