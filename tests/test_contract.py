"""The contract: every method times every invariant, in one process. A method that skips an invariant says why.

Each test is named after the invariant. What one method computes exactly is in test_exact_method.py, test_family.py,
test_wise_ft.py and test_post_hoc.py; the invariants with several processes are in test_distributed.py.
"""

from __future__ import annotations

import csv
import math
import pickle
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.radii import WithRadii
from properties import assert_inside_ball, assert_same
from reference import ReferenceFTP, ReferenceSPD
from test_family import STEPS, start
from test_family import assert_same as assert_close_to_loop
from toys import (
    BATCH_SIZE,
    StatefulLoader,
    Toy,
    adamw,
    images,
    quiet_trainer,
    toy,
    train_loader,
    val_loader,
)


class Method(NamedTuple):
    """One method as the contract sees it.

    Args:
        make: Builds the callback; takes `exclude` and `pretrained`. Its settings are strong: what it does shows.
        yaml: The same arguments in a LightningCLI file.
        at_end: Whether it acts at the end of the fit only.
        reads_gradients: Whether it needs the gradients that the optimizer uses.
        no_ball: Why the invariant "inside the ball" does not apply.
    """

    make: Callable[..., MethodCallback]
    yaml: str
    at_end: bool = False
    reads_gradients: bool = False
    no_ball: str = ""


METHODS = {
    "TPGM mars": Method(partial(TPGMCallback, every_n_steps=1), "TPGMCallback: {norm: mars, every_n_steps: 1}"),
    "TPGM l2": Method(
        partial(TPGMCallback, norm="l2", radius_lr=0.01, every_n_steps=1),
        "TPGMCallback: {norm: l2, radius_lr: 0.01, every_n_steps: 1}",
    ),
    "TPGM at fit end": Method(
        partial(TPGMCallback, norm="l2", when="fit_end", radius_steps=3),
        "TPGMCallback: {norm: l2, when: fit_end, radius_steps: 3}",
        at_end=True,
    ),
    "FTP": Method(FTPCallback, "FTPCallback: {k: 1.0}", reads_gradients=True),
    "DiGraP": Method(
        partial(DiGraPCallback, omega_lr=0.3),
        "DiGraPCallback: {omega_lr: 0.3}",
        reads_gradients=True,
        no_ball="DiGraP changes the direction of gradients and bounds no distance",
    ),
    "SPD": Method(
        partial(SPDCallback, strength=0.9),
        "SPDCallback: {strength: 0.9}",
        reads_gradients=True,
        no_ball="SPD decays the growth of a distance and bounds none",
    ),
    "L2-SP": Method(
        partial(L2SPCallback, strength=0.5),
        "L2SPCallback: {strength: 0.5}",
        reads_gradients=True,
        no_ball="L2-SP is a penalty: any distance is possible",
    ),
    "anchor decay": Method(
        partial(AnchorDecayCallback, strength=0.5),
        "AnchorDecayCallback: {strength: 0.5}",
        no_ball="A decay towards the anchor bounds no distance",
    ),
    "WiSE-FT": Method(
        partial(WiSEFTCallback, alpha=0.5),
        "WiSEFTCallback: {alpha: 0.5}",
        at_end=True,
        no_ball="WiSE-FT interpolates and learns no radius",
    ),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


def run(module: pl.LightningModule, *callbacks: pl.Callback, train: Any = None, **options: Any) -> pl.Trainer:
    """Two epochs of six steps, from the same seeds every time."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = quiet_trainer(*callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module, train_loader() if train is None else train, val_loader(), ckpt_path=ckpt_path)
    return trainer


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def outcome(trainer: pl.Trainer, module: pl.LightningModule, path: Path, callback: pl.Callback | None = None) -> Any:
    """What a run ends with: weights, buffers, optimizer state and, if asked for, the callback's state."""
    trainer.save_checkpoint(path / "outcome.ckpt")
    checkpoint = torch.load(path / "outcome.ckpt", weights_only=True)
    kept = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "epoch", "global_step")}
    if callback is not None:
        kept["callback"] = checkpoint["callbacks"][callback.state_key]
        kept["shown"] = {n: getattr(callback, n, None) for n in ("radii", "distances", "omegas")}
    return kept


# --- no trace ---


class BusyToy(Toy):
    """Draws from every generator, keeps metrics, counts, logs, and has one parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.error = MeanSquaredError()
        self.dropout = nn.Dropout(0.3)
        self.batches: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = self.dropout(batch[0]) + np.random.rand() * random.random()
        output = self(x)
        self.error(output, batch[1])
        self.batches.append(batch_idx)
        loss = nn.functional.mse_loss(output, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("error", self.error)
        return loss


@pytest.mark.filterwarnings("ignore:.*no constrained tensor has moved:UserWarning")  # what is constrained is unused
@pytest.mark.parametrize("log", ["none", "summary", "all"])
def test_no_trace(method: Method, log: str, tmp_path: Path) -> None:
    """With nothing but an unused parameter to constrain, the run is the one without the callback, to the bit.

    So is the metrics file, less the callback's own columns.
    """

    def busy_run(path: Path, *callbacks: pl.Callback) -> Any:
        path.mkdir()
        torch.manual_seed(3)
        module = BusyToy()
        trainer = run(module, *callbacks, logger=CSVLogger(path, version=""), log_every_n_steps=1)
        generators = [torch.get_rng_state(), np.random.get_state()[1], random.getstate()]
        metrics = users_rows((path / "lightning_logs" / "metrics.csv").read_text())
        return outcome(trainer, module, path), generators, metrics, module.batches, module.training

    callback = method.make(exclude=["backbone.*", "norm.*", "hidden.*", "head.*", "scale"], log=log)
    found, expected = busy_run(tmp_path / "with", callback), busy_run(tmp_path / "without")
    assert list(callback.anchor) == ["unused"]
    assert_same(found, expected)


def users_rows(metrics_file: str) -> list[list[tuple[str, str]]]:
    """What the user logged, row by row: without the columns of a callback, and without the rows that are its alone."""
    rows = [
        [(name, value) for name, value in row.items() if value and not OWN_COLUMN.match(name)]
        for row in csv.DictReader(metrics_file.splitlines())
    ]
    return [row for row in rows if dict(row).keys() - {"step", "epoch"}]


OWN_COLUMN = re.compile(
    "(tpgm|ftp|digrap|spd|l2sp|anchor_decay|wise_ft)(_radius|_distance|_ratio|_bound|_wanted|_allowed|_omega)?/"
)


def test_no_trace_of_hooks_after_the_fit(method: Method) -> None:
    trainer = run(toy(), method.make())
    hooks = [*trainer.optimizers[0]._optimizer_step_post_hooks, *trainer.optimizers[0]._optimizer_step_pre_hooks]
    assert hooks == []


class Stop(Exception):
    pass


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


def test_no_trace_of_hooks_after_an_exception(method: Method) -> None:
    trainer = quiet_trainer(method.make(), StopAt(2))
    with pytest.raises(Stop):
        trainer.fit(toy(), train_loader(), val_loader())
    hooks = [*trainer.optimizers[0]._optimizer_step_post_hooks, *trainer.optimizers[0]._optimizer_step_pre_hooks]
    assert hooks == []


# --- inside the ball ---


class Looking(Toy):
    """Looks at its weights after each optimizer step."""

    look: Callable[[], None]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.look()


def looking(optimizer: Any = None) -> Looking:
    module = Looking(optimizer)
    module.load_state_dict(toy().state_dict())
    return module


@pytest.mark.parametrize("optimizer", [None, adamw], ids=["sgd", "adamw"])
def test_inside_ball(method: Method, optimizer: Any) -> None:
    if method.no_ball:
        pytest.skip(method.no_ball)
    module, callback = looking(optimizer), method.make()
    assert isinstance(callback, WithRadii)
    start, looks = parameters(module), 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if not method.at_end:
            assert set(callback.radii) == set(start)
            assert_inside_ball(module, start, callback.radii, callback.norm)

    module.look = look
    run(module, callback)
    assert looks == 12
    assert_inside_ball(module, start, callback.radii, callback.norm)
    radii = {name: 0.0 if math.isnan(radius) else radius for name, radius in callback.radii.items()}  # never moved
    assert all(distance <= radii[name] * (1 + 1e-5) for name, distance in callback.distances.items())


# --- exact resume ---


class Resumable(Toy):
    """Trains on a loader that can be stopped in mid-epoch."""

    def train_dataloader(self) -> StatefulLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return StatefulLoader(images(6 * BATCH_SIZE, seed=1), in_flight=lambda: progress.ready - progress.processed)

    def val_dataloader(self) -> DataLoader:
        return val_loader()


class SaveAt(pl.Callback):
    """Saves after a step; that of an epoch's last step is saved when the epoch is over."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.is_last_batch:
            trainer.save_checkpoint(self.path)


class UnfreezeAt(pl.Callback):
    """Thaws the backbone at a step, also in a resumed run (`BackboneFinetuning` leaves it frozen there)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= self.step:
            pl_module.backbone.requires_grad_(True)


@pytest.mark.parametrize(
    ("step", "unfreezes"),
    [(1, False), (6, False), (8, False), (4, True), (8, True)],
    ids=["mid-epoch, first step", "between epochs", "mid-epoch", "before unfreezing", "after unfreezing"],
)
def test_exact_resume(method: Method, step: int, unfreezes: bool, tmp_path: Path) -> None:
    """Stopped and resumed with everything made anew is never stopped, bit for bit; the anchor is the original one."""

    def one_fit(seed: int, max_steps: int, *others: pl.Callback, ckpt_path: Path | None = None) -> Any:
        torch.manual_seed(seed)
        module, callback = Resumable(adamw), method.make()
        module.optimizer = lambda _: adamw(module.parameters())
        module.load_state_dict(toy(seed).state_dict())
        thaw = [UnfreezeAt(6)] if unfreezes else []
        trainer = quiet_trainer(*thaw, callback, *others, max_epochs=3, max_steps=max_steps)
        trainer.fit(module, ckpt_path=ckpt_path)
        return outcome(trainer, module, tmp_path, callback)

    expected = one_fit(0, -1)
    one_fit(0, step, SaveAt(tmp_path / "stopped.ckpt", step))
    stopped = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert stopped["global_step"] == step
    found = one_fit(1, -1, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(found, expected)
    start = values(toy(0))
    assert_same({name: start[name] for name in found["callback"]["anchor"]}, found["callback"]["anchor"])
    assert set(parameters(toy())) <= set(found["callback"]["anchor"])


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, NO_GPU])


@pytest.mark.parametrize("accelerator", ["cpu", ON_GPU])
def test_exact_resume_by_the_same_trainer(method: Method, accelerator: str, tmp_path: Path) -> None:
    """A second `fit` of one trainer goes on with the first. (Its optimizers start anew: here they have no state.)"""
    if method.at_end:
        pytest.skip("acts at the end of each fit: two fits are not one")

    def plain_sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    module, callback, options = toy(0, plain_sgd), method.make(), {"accelerator": accelerator, "devices": 1}
    expected = outcome(run(module, callback, max_epochs=2, **options), module, tmp_path, callback)
    module, callback = toy(0, plain_sgd), method.make()
    trainer = run(module, callback, max_epochs=1, **options)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_loader(), val_loader())
    found = outcome(trainer, module, tmp_path, callback)
    if accelerator == "gpu":  # its sums have no fixed order
        torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-3, atol=1e-4)
    else:
        assert_same({**found, "optimizer_states": 0}, {**expected, "optimizer_states": 0})


def test_exact_resume_is_not_confused_by_reuse(method: Method, tmp_path: Path) -> None:
    """A callback that went through one fit starts afresh in another trainer."""
    module, callback = toy(1), method.make()
    expected = outcome(run(module, callback), module, tmp_path, callback)
    callback = method.make()
    run(toy(0), callback, max_epochs=1)
    module = toy(1)
    assert_same(outcome(run(module, callback), module, tmp_path, callback), expected)


# --- clear failure ---

BAD_ARGUMENTS = [
    *(
        (make, {name: value}, rf"`{name}` should be {expected}, found {found}\.")
        for make, name, value, expected, found in [
            (TPGMCallback, "radius_lr", -0.1, "a positive number or 'auto'", "-0.1"),
            (TPGMCallback, "radius_lr", True, "a positive number or 'auto'", "True"),
            (TPGMCallback, "norm", "l1", "one of 'mars', 'l2'", "'l1'"),
            (TPGMCallback, "radius_steps", 0, "a positive integer", "0"),
            (TPGMCallback, "every_n_steps", 1.5, "a positive integer", "1.5"),
            (TPGMCallback, "loss", "test_step", "None, 'validation_step' or a callable .*", "'test_step'"),
            (TPGMCallback, "when", "now", "'training' or 'fit_end'", "'now'"),
            (TPGMCallback, "when", ["fit_end"], "'training' or 'fit_end'", r"\['fit_end'\]"),
            (TPGMCallback, "dataloader", 3, "a loader, .*", "3"),
            (TPGMCallback, "dataloader", "held out", "an import path .*", "'held out'"),
            (FTPCallback, "k", 1.5, r"a number in \[0, 1\]", "1.5"),
            (FTPCallback, "k", float("nan"), r"a number in \[0, 1\]", "nan"),
            (FTPCallback, "radius_lr", 0, "a positive number or 'auto'", "0"),
            (FTPCallback, "norm", None, "one of 'mars', 'l2'", "None"),
            (DiGraPCallback, "omega_lr", float("inf"), "a positive number", "inf"),
            (DiGraPCallback, "omega_lr", "0.1", "a positive number", "'0.1'"),
            (SPDCallback, "strength", -1, "a number that is not negative", "-1"),
            (L2SPCallback, "strength", -1, "a number that is not negative", "-1"),
            (WiSEFTCallback, "alpha", 1.1, r"a number in \[0, 1\], 'sweep' or None", "1.1"),
            (WiSEFTCallback, "alpha", "0.5", r"a number in \[0, 1\], 'sweep' or None", "'0.5'"),
        ]
    ),
    (TPGMCallback, {"when": "fit_end", "every_n_steps": 2}, "`every_n_steps` = 2 has no effect with `when`"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD_ARGUMENTS)
def test_clear_failure_bad_argument(make: Callable[..., pl.Callback], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"^{message}"):
        make(**arguments)


@pytest.mark.parametrize(
    ("argument", "value"), [("exclude", "head.*"), ("exclude", [1]), ("exclude", None), ("pretrained", 3)]
)
def test_clear_failure_bad_shared_argument(method: Method, argument: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"^`{argument}` should be .*, found {re.escape(repr(value))}"):
        method.make(**{argument: value})


def test_clear_failure_nothing_to_constrain(method: Method) -> None:
    callback = method.make(exclude=["*"])
    name = type(callback).__name__
    with pytest.raises(MisconfigurationException, match=rf"^{name} has nothing to constrain\. .*`exclude` = \['\*'\]"):
        run(toy(), callback)


def test_clear_failure_pattern_without_match(method: Method) -> None:
    with pytest.raises(MisconfigurationException, match=r"^`exclude` pattern 'haed\.\*' matches no .* 'head.weight'"):
        run(toy(), method.make(exclude=["haed.*"]))


def test_clear_failure_pretrained_file_is_missing(method: Method, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"^`pretrained` should be an existing file, found '.*a\.ckpt'"):
        run(toy(), method.make(pretrained=tmp_path / "a.ckpt"))


def test_clear_failure_checkpoint_without_state(method: Method, tmp_path: Path) -> None:
    """Resuming a run that did not have the callback: the anchor is unknown, unless `pretrained` tells it."""
    run(toy(0), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    callback = method.make()
    message = rf"plain.ckpt' has no state of this {type(callback).__name__} \(key .* Pass them as `pretrained`"
    with pytest.raises(MisconfigurationException, match=message):
        run(toy(1), callback, ckpt_path=tmp_path / "plain.ckpt")

    callback = method.make(pretrained=toy(0))
    run(toy(1), callback, ckpt_path=tmp_path / "plain.ckpt")
    start = values(toy(0))
    assert_same(callback.anchor, {name: start[name] for name in callback.anchor})


def test_clear_failure_checkpoint_of_another_module(method: Method, tmp_path: Path) -> None:
    trainer = run(toy(0), method.make(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    state["anchor"]["head.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    message = r"^The checkpoint's anchor of 'head.weight' has shape \(3, 3\), found shape \(2, 5\)"
    with pytest.raises(MisconfigurationException, match=message):
        run(toy(0), method.make(), ckpt_path=tmp_path / "a.ckpt")


def scaling(**options: Any) -> MixedPrecision:
    """16-mixed on the CPU."""
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": 256.0, **options})
    return MixedPrecision("16-mixed", "cpu", scaler)


def fused(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02, fused=True)


def test_clear_failure_fused_optimizer_under_a_scaler(method: Method) -> None:
    """Such an optimizer unscales inside its step: refused by the methods that read gradients, by name."""
    callback = method.make()
    if method.reads_gradients:
        message = rf"^{type(callback).__name__} needs unscaled gradients, but AdamW unscales .*fused=False"
        with pytest.raises(MisconfigurationException, match=message):
            run(Branches(fused), callback, plugins=[scaling()])
    else:
        module = Branches(fused)
        run(module, callback, plugins=[scaling()])
        assert_constrained(callback, Branches(), module)


def test_a_fused_optimizer_without_a_scaler_is_welcome(method: Method) -> None:
    module, callback = Branches(fused), method.make()
    run(module, callback)
    expected = Branches(adamw)
    run(expected, method.make())
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-4, atol=1e-5)
    assert_constrained(callback, Branches(), module)


def assert_constrained(callback: MethodCallback, start: nn.Module, module: nn.Module) -> None:
    """All parameters have an anchor where they started, the module is elsewhere now, and the balls hold."""
    anchors = parameters(start)
    assert_same({name: callback.anchor[name] for name in anchors}, anchors)
    assert any(not torch.equal(parameter, anchors[name]) for name, parameter in parameters(module).items())
    if isinstance(callback, WithRadii):
        assert_inside_ball(module, anchors, callback.radii, callback.norm)


# --- which parameters ---


def test_frozen_parameters_are_ignored(method: Method) -> None:
    module, callback = toy(), method.make()
    module.hidden.requires_grad_(False)
    frozen = parameters(module.hidden)
    run(module, callback)
    assert set(callback.anchor) & set(parameters(module)) == {n for n in parameters(module) if "hidden" not in n}
    assert_same(parameters(module.hidden), frozen)


def test_parameters_unfrozen_later_join(method: Method) -> None:
    """Those that `BackboneFinetuning` unfreezes get the value that they have then as their anchor."""
    module, callback = looking(), method.make()
    start, seen = parameters(module), []

    def look() -> None:
        seen.append(set(callback.anchor) & set(start))

    module.look = look
    run(module, callback, BackboneFinetuning(1, backbone_initial_lr=0.05, train_bn=False), max_epochs=3)
    frozen = {"backbone.0.weight", "backbone.0.bias"}  # not its BatchNorm
    assert seen == [set(start) - frozen] * 6 + [set(start)] * 12
    assert_constrained(callback, toy(), module)


class Tied(pl.LightningModule):
    """Two names for one weight, or the same weight used twice under one name."""

    def __init__(self, names: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first = nn.Linear(16, 16, bias=False)
            self.head = nn.Linear(16, 2)
        if names == 2:
            self.second = nn.Linear(16, 16, bias=False)
            self.second.weight = self.first.weight
        self.names = names

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        second = self.second if self.names == 2 else self.first
        return nn.functional.mse_loss(self.head(second(torch.tanh(self.first(batch[0].flatten(1))))), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_tied_parameters_count_once(method: Method) -> None:
    tied, callback = Tied(names=2), method.make()
    run(tied, callback)
    once = Tied(names=1)
    run(once, method.make())
    assert list(callback.anchor) == ["first.weight", "head.weight", "head.bias"]
    assert tied.second.weight is tied.first.weight
    assert_same(parameters(tied), parameters(once))


class Branch(nn.Module):
    """A linear map, written such that autocast leaves it in the dtype of its weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(2, 16, generator=generator) / 4)
        self.bias = nn.Parameter(torch.randn(2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x[:, None] * self.weight).sum(dim=2) + self.bias)


class Branches(pl.LightningModule):
    """Two branches that share nothing: neither's gradients depend on the other."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.left, self.right = Branch(1), Branch(2)
        self.optimizer = optimizer or partial(torch.optim.SGD, lr=0.5, momentum=0.9)

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, y = batch[0].flatten(1), batch[1]
        return [nn.functional.mse_loss(branch(x), y) for branch in (self.left, self.right)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        return sum(self.losses(batch), torch.zeros(()))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return sum(self.losses(batch), torch.zeros(()))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def test_exclude_is_honoured(method: Method) -> None:
    """An excluded branch trains as if there was no callback, to the bit; the other one does not."""
    plain = Branches()
    run(plain)
    module, callback = Branches(), method.make(exclude=["left.*"])
    run(module, callback)
    assert list(callback.anchor) == ["right.weight", "right.bias"]
    assert_same(parameters(module.left), parameters(plain.left))
    for name, parameter in parameters(module.right).items():
        assert not torch.equal(parameter, parameters(plain.right)[name])


def test_anchor_is_a_copy(method: Method) -> None:
    """Neither training nor what the user does to the pretrained source afterwards moves the anchor."""
    source, module = toy(1), toy(0)
    expected = values(source)

    class Spoil(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            with torch.no_grad():
                for tensor in [*source.parameters(), *source.buffers()]:
                    tensor.zero_()

    callback = method.make(pretrained=source)
    run(module, callback, Spoil())
    assert_same(callback.anchor, {name: expected[name] for name in callback.anchor})
    with torch.no_grad():
        module.scale.zero_()
    assert callback.anchor["scale"] == 1.5


# --- what optimizers do ---


def test_gradient_accumulation_equals_larger_batches(method: Method) -> None:
    """Methods count optimizer steps, not batches."""

    def batches_of(size: int) -> DataLoader:
        return DataLoader(TensorDataset(*(t.double() for t in images(24, seed=1).tensors)), size)

    module, callback = Branches(), method.make()
    run(module, callback, train=batches_of(2), accumulate_grad_batches=2, precision="64-true")
    expected, reference = Branches(), method.make()
    run(expected, reference, train=batches_of(4), precision="64-true")
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-6, atol=1e-9)
    if isinstance(callback, WithRadii) and isinstance(reference, WithRadii):
        assert callback.radii == pytest.approx(reference.radii, rel=1e-6, abs=1e-9, nan_ok=True)


class ManyOptimizers(Branches):
    """Manual optimization, one optimizer for each branch; raw: around Lightning, as torch would do it."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw
        self.look: Callable[[], None] = lambda: None

    def configure_optimizers(self) -> Any:
        return [self.optimizer(branch.parameters()) for branch in (self.left, self.right)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        left, right = self.optimizers(use_pl_optimizer=not self.raw)
        left.zero_grad()
        right.zero_grad()
        self.manual_backward(sum(self.losses(batch), torch.zeros(())))
        left.step()
        self.look()
        right.step()
        self.look()


def for_manual_optimization(method: Method) -> MethodCallback:
    callback = method.make()
    if not isinstance(callback, TPGMCallback):
        return callback
    return TPGMCallback(
        radius_lr=callback.radius_lr,
        norm=callback.norm,
        when=callback.when,
        radius_steps=callback.radius_steps,
        every_n_steps=callback.every_n_steps,
        loss="validation_step",
    )


def test_several_optimizers(method: Method) -> None:
    """One optimizer for each branch is one for both: a step of one leaves the other's tensors alone."""
    module, callback = ManyOptimizers(), for_manual_optimization(method)
    start = parameters(module)

    def look() -> None:
        if isinstance(callback, WithRadii) and not method.at_end:
            assert_inside_ball(module, start, callback.radii, callback.norm)

    module.look = look
    run(module, callback)
    if isinstance(callback, TPGMCallback) and not method.at_end:
        return  # evaluates after each step of either, on a batch of its own: there is no single-optimizer twin
    expected = Branches()
    run(expected, for_manual_optimization(method))
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-6, atol=1e-7)


def test_several_optimizers_that_step_around_lightning(method: Method) -> None:
    """Methods that change gradients before the step say that they cannot; the others see every step."""
    module, callback = ManyOptimizers(raw=True), for_manual_optimization(method)
    if callback.make_method().changes_gradients:
        message = rf"^{type(callback).__name__} changes gradients .*(?s:.*) stepped without it.*use_pl_optimizer=True"
        with pytest.raises(MisconfigurationException, match=message):
            run(module, callback)
        return
    run(module, callback)
    expected = ManyOptimizers(raw=False)
    run(expected, for_manual_optimization(method))
    assert_same(parameters(module), parameters(expected))


def test_gradient_clipping(method: Method) -> None:
    """A bound that is never reached changes nothing; one that is reached is seen by the method."""

    def clipped(value: float | None) -> tuple[dict[str, Tensor], MethodCallback]:
        module, callback = Branches(), method.make()
        run(module, callback, gradient_clip_val=value)
        return parameters(module), callback

    free, _ = clipped(None)
    assert_same(clipped(1e6)[0], free)
    weights, callback = clipped(0.05)
    start = parameters(Branches())  # a tensor that is pinned to its anchor is there in both
    pinned = {
        name for name, weight in weights.items() if isinstance(callback, WithRadii) and weight.allclose(start[name])
    }
    assert pinned < weights.keys()
    assert not any(torch.equal(weight, free[name]) for name, weight in weights.items() if name not in pinned)
    if isinstance(callback, WithRadii):
        assert_inside_ball(weights, parameters(Branches()), callback.radii, callback.norm)


@pytest.mark.parametrize("name", ["FTP", "SPD"])
def test_gradient_clipping_is_seen(name: str) -> None:
    """Methods that read the gradient after the step find the one that was used, against a loop by hand.

    (L2-SP and DiGraP change it before it is clipped: see test_family.py.)
    """
    module, by_hand, data = start("sgd", seed=3)
    callback = METHODS[name].make()
    trainer = quiet_trainer(callback, precision="64-true", gradient_clip_val=0.1)
    trainer.fit(module, data)
    references = {
        "FTP": lambda: ReferenceFTP(by_hand.anchors, radius_lr="auto"),
        "SPD": lambda: ReferenceSPD(by_hand.anchors, 0.9),
    }
    reference = references[name]()
    for x in by_hand.train:
        by_hand.backward(x)
        norm = torch.nn.utils.clip_grad_norm_(list(by_hand.weights.values()), 0.1)
        assert norm > 0.1
        before, grads = by_hand.values(), by_hand.grads
        by_hand.optimizer.step()
        after = (before, by_hand.values(), grads) if name == "SPD" else (by_hand.values(), grads)
        by_hand.write(reference.after_step(*after))
    assert len(by_hand.train) == STEPS
    assert_close_to_loop(module, by_hand)


class WithBadBatches(Branches):
    """Its gradients are not finite on a batch that holds infinity: a gradient scaler skips that step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.where(batch[1].isinf().any(), torch.inf, 1.0)


def test_a_step_that_the_gradient_scaler_skips_is_none(method: Method, tmp_path: Path) -> None:
    """The run with batches that are skipped is the run without these batches, to the bit."""
    x, y = images(6 * BATCH_SIZE, seed=1).tensors
    bad_x, bad_y = x[:BATCH_SIZE], torch.full_like(y[:BATCH_SIZE], torch.inf)
    half = 3 * BATCH_SIZE
    with_bad = TensorDataset(
        torch.cat([bad_x, x[:half], bad_x, x[half:]]), torch.cat([bad_y, y[:half], bad_y, y[half:]])
    )
    results = []
    for data in (TensorDataset(x, y), with_bad):
        module, callback = WithBadBatches(), method.make()
        trainer = run(module, callback, train=DataLoader(data, BATCH_SIZE), plugins=[scaling()], max_epochs=1)
        result = outcome(trainer, module, tmp_path, callback)
        results.append({key: result[key] for key in ("state_dict", "optimizer_states", "callback", "shown")})
    assert_same(results[1], results[0])


# --- precision ---

PRECISIONS: dict[str, tuple[Callable[[], dict[str, Any]], torch.dtype, float]] = {
    "64-true": (lambda: {"precision": "64-true"}, torch.float64, 1e-12),
    "32-true": (lambda: {"precision": "32-true"}, torch.float32, 1e-4),
    "16-mixed": (lambda: {"plugins": [scaling()]}, torch.float32, 0.05),
    "bf16-mixed": (lambda: {"precision": "bf16-mixed"}, torch.float32, 0.5),
    "bf16-true": (lambda: {"precision": "bf16-true"}, torch.bfloat16, 0.8),
}


class Matrices(Branches):
    """The branches in matrix products, which autocast computes in less precision."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=0.2))

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, y = batch[0].flatten(1), batch[1]
        outputs = [torch.tanh(nn.functional.linear(x, b.weight, b.bias)) for b in (self.left, self.right)]
        return [nn.functional.mse_loss(output, y) for output in outputs]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(method: Method, precision: str) -> None:
    """In each precision the run follows that in float64, by a fraction of what the method changes in it."""
    options, dtype, tolerance = PRECISIONS[precision]

    def trained(options: dict[str, Any], *callbacks: pl.Callback) -> dict[str, Tensor]:
        module = Matrices()
        run(module, *callbacks, **options)
        return parameters(module)

    def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm())

    callback = method.make()
    found = trained(options(), callback)
    assert {value.dtype for value in found.values()} == {dtype} == {value.dtype for value in callback.anchor.values()}
    exact, plain = trained({"precision": "64-true"}, method.make()), trained({"precision": "64-true"})
    assert apart(found, exact) <= tolerance * apart(plain, exact)
    if isinstance(callback, WithRadii):
        assert_inside_ball(found, callback.anchor, callback.radii, callback.norm)


# --- the object ---


def test_repr_is_one_line(method: Method) -> None:
    callback = method.make(exclude=["head.*"], pretrained=toy())
    assert repr(callback).startswith(f"{type(callback).__name__}(")
    assert repr(callback).endswith("exclude=('head.*',))")
    assert "\n" not in repr(callback)
    assert len(repr(callback)) < 120


def test_picklable_before_and_after_the_fit(method: Method, tmp_path: Path) -> None:
    """A copy made before the fit does the same; one made after it knows the same."""
    module, callback = toy(), method.make()
    copy = pickle.loads(pickle.dumps(callback))
    trainer = run(module, callback)
    other = toy()
    assert_same(
        outcome(run(other, copy), other, tmp_path, copy), expected := outcome(trainer, module, tmp_path, callback)
    )

    after = pickle.loads(pickle.dumps(callback))
    assert repr(after) == repr(callback)
    assert_same(after.state_dict(), expected["callback"])
    assert_same(after.anchor, callback.anchor)


def test_built_from_yaml(method: Method, tmp_path: Path) -> None:
    """LightningCLI builds each from class_path and init_args, and again from the configuration that it saves."""
    name, arguments = method.yaml.split(": ", 1)
    config = tmp_path / "config.yaml"
    config.write_text(f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_tpgm.{name}
      init_args:
        exclude: [left.*]
        pretrained: {tmp_path}/start.pt
        <<: {arguments}
""")
    torch.save(Branches().state_dict(), tmp_path / "start.pt")

    def build(path: Path) -> LightningCLI:
        args = ["--config", str(path)]
        return LightningCLI(
            YamlBranches, run=False, seed_everything_default=False, args=args, save_config_callback=None
        )

    cli = build(config)
    callback = cli.trainer.callbacks[0]
    assert repr(callback) == repr(method.make(exclude=["left.*"]))
    assert callback.pretrained == f"{tmp_path}/start.pt"
    torch.manual_seed(0)
    cli.trainer.fit(cli.model, train_loader(), val_loader())
    assert list(callback.anchor) == ["right.weight", "right.bias"]

    (tmp_path / "saved.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    assert repr(build(tmp_path / "saved.yaml").trainer.callbacks[0]) == repr(callback)


class YamlBranches(Branches):
    """A module that needs no arguments."""

    def __init__(self) -> None:
        super().__init__()
