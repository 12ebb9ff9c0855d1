"""When the callback acts: after every step of every optimizer that really happened, and on which parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tpgm import FTPCallback, SPDCallback, TPGMCallback
from properties import assert_inside_balls, assert_same, row_distances
from toys import CLASSES, AfterEachStep, Blobs, Classifier, classifier_loss, trainer_in, weights_of


class Watch(pl.Callback):
    """Notes at every optimizer step the weights before it, after it, and as the callback left them.

    Listed before the callback it hears of the step first; `left` is called after the callback has acted.
    """

    def __init__(self, callback: TPGMCallback) -> None:
        self.callback = callback
        self.steps: list[dict[str, dict[str, Tensor]]] = []
        self.evaluations: list[int] = []  # held-out losses in each step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.steps.append({"before": weights_of(pl_module)}))
            optimizer.register_step_post_hook(lambda *_: self.note("stepped", pl_module))

    def note(self, name: str, pl_module: pl.LightningModule) -> None:
        self.steps[-1][name] = weights_of(pl_module)
        self.evaluations.append(0)

    def loss(self, pl_module: Classifier, batch: Any) -> Tensor:
        """For the argument `loss`."""
        self.evaluations[-1] += 1
        return classifier_loss(pl_module, batch)

    def left(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """For `AfterEachStep`: what others see from now on."""
        self.steps[-1]["left"] = weights_of(pl_module)
        assert_inside_balls(pl_module, self.callback.anchor, self.callback.radii)


def watched_fit(
    tmp_path: Path, module: pl.LightningModule, data: pl.LightningDataModule | None = None, **settings: Any
) -> tuple[TPGMCallback, Watch]:
    """A fit in which every step of every optimizer is watched. Arguments of the callback are under ``tpgm``."""
    tpgm = settings.pop("tpgm", {})
    callback = TPGMCallback(loss=lambda pl_module, batch: watch.loss(pl_module, batch), **{"every_n_steps": 1, **tpgm})
    watch = Watch(callback)
    callbacks = [watch, callback, AfterEachStep(watch.left), *settings.pop("callbacks", [])]
    trainer_in(tmp_path, **{"limit_val_batches": 0, **settings}, callbacks=callbacks).fit(module, data or Blobs())
    return callback, watch


def assert_projected_after_every_step(watch: Watch, callback: TPGMCallback) -> None:
    """Between the steps nobody moves a weight; after each one the callback did, if only towards the anchor."""
    projections = 0
    for step, following in zip(watch.steps, watch.steps[1:], strict=False):
        assert_same(following["before"], step["left"])
    for step in watch.steps:
        assert step.keys() == {"before", "stepped", "left"}
        for name in callback.radii:
            anchor = callback.anchor[name]
            before, after = (row_distances(step[moment][name], anchor, "mars") for moment in ("stepped", "left"))
            assert (after <= before * (1 + 1e-6)).all()
            projections += int((after < 0.999 * before).sum())
    assert projections > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_acts_after_every_step(optimizer: Any, tmp_path: Path) -> None:
    module = Classifier()
    module.configure_optimizers = lambda: optimizer(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    callback, watch = watched_fit(tmp_path, module, max_epochs=2)
    assert watch.evaluations == [1] * 8
    assert_projected_after_every_step(watch, callback)


def test_fused_optimizer(tmp_path: Path) -> None:
    """Its steps do not count in a tensor's version."""
    module = Classifier()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    callback, watch = watched_fit(tmp_path, module)
    assert watch.evaluations == [1] * 4
    assert_projected_after_every_step(watch, callback)


@pytest.mark.parametrize(
    ("radius_steps", "every_n_steps", "expected"),
    [(1, 1, [1] * 8), (3, 1, [3] * 8), (1, 3, [1, 0, 0, 1, 0, 0, 1, 0]), (2, 4, [2, 0, 0, 0, 2, 0, 0, 0])],
)
def test_radii_are_updated_as_often_as_asked(
    radius_steps: int, every_n_steps: int, expected: list[int], tmp_path: Path
) -> None:
    """The first step included; the count goes on over epochs; weights are projected after every step."""
    tpgm = {"radius_steps": radius_steps, "every_n_steps": every_n_steps}
    callback, watch = watched_fit(tmp_path, Classifier(), max_epochs=2, tpgm=tpgm)
    assert watch.evaluations == expected
    assert_projected_after_every_step(watch, callback)
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [sum(expected)] * 4


@pytest.mark.parametrize(("accumulate", "expected"), [(2, 2), (3, 2), (4, 1)])
def test_gradient_accumulation(accumulate: int, expected: int, tmp_path: Path) -> None:
    """One step for several batches; the last ones of an epoch count, too."""
    callback, watch = watched_fit(tmp_path, Classifier(), accumulate_grad_batches=accumulate)
    assert watch.evaluations == [1] * expected
    assert_projected_after_every_step(watch, callback)


def test_lbfgs(tmp_path: Path) -> None:
    """It evaluates the training loss many times within one step: those weights are its own affair."""
    evaluations = []

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            evaluations.append(1)
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    callback, watch = watched_fit(tmp_path, Module())
    assert watch.evaluations == [1] * 4
    assert len(evaluations) > 8
    assert_projected_after_every_step(watch, callback)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.:UserWarning")  # what is meant here
def test_training_step_that_skips_its_batch(tmp_path: Path) -> None:
    """The optimizer steps without gradients, so the weights stay, and the radii are updated as after any step."""

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 2 else self.loss(batch)

    callback, watch = watched_fit(tmp_path, Module())
    assert watch.evaluations == [1] * 4
    assert_same(watch.steps[2]["stepped"], watch.steps[2]["before"])
    assert_projected_after_every_step(watch, callback)


def test_step_that_a_gradient_scaler_skips(tmp_path: Path) -> None:
    """`trainer.global_step` counts it, the optimizer does not: nothing happened, so nothing is done."""
    moments: list[tuple[int, int, dict[str, float]]] = []

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx == 1 else 1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            watch = self.trainer.callbacks[0]
            moments.append((self.trainer.global_step, len(watch.steps), watch.callback.radii))

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    callback, watch = watched_fit(tmp_path, Module(), plugins=[plugin])
    assert [moment[:2] for moment in moments] == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert moments[1][2] == moments[0][2]
    assert watch.evaluations == [1] * 3
    assert_projected_after_every_step(watch, callback)


def test_fused_step_that_a_gradient_scaler_skips(tmp_path: Path) -> None:
    """Torch calls its hooks all the same: weights, radii and Adam state stay; it counts for `every_n_steps`."""
    states: list[dict[str, Any]] = []
    weights: list[dict[str, Tensor]] = []

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx in (0, 2) else 1.0)

        def on_train_batch_end(self, *_: Any) -> None:
            states.append(self.trainer.callbacks[1].state_dict()["method"])
            weights.append(weights_of(self))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)

    start = weights_of(Module())
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    callback, watch = watched_fit(tmp_path, Module(), tpgm={"radius_lr": 1e-6}, plugins=[plugin])
    assert watch.evaluations == [1] * 4
    assert_same(weights[0], start)
    assert states[0]["radii"]["value"].isnan().all()  # the radii begin with the first step that is made
    for radius, (name, weight) in zip(states[1]["radii"]["value"], watch.steps[1]["stepped"].items(), strict=True):
        assert radius == pytest.approx(float(row_distances(weight, start[name], "mars").min()) / 2, abs=3e-6)
    torch.testing.assert_close(weights[2], weights[1])
    assert_same(states[2]["radii"], states[1]["radii"])
    assert [state["steps"] for state in states] == [{0: count} for count in (1, 2, 3, 4)]
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [2] * 4


# --- manual optimization ---


class Manual(Classifier):
    """Steps its optimizers itself, each with its own part of the module."""

    def __init__(self, raw: bool = False, toggle: bool = False, together: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw, self.toggle, self.together = raw, toggle, together
        self.flags: list[list[bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            flags = [parameter.requires_grad for parameter in self.parameters()]
            optimizer.step()
            assert [parameter.requires_grad for parameter in self.parameters()] == flags
            self.flags.append(flags)
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = [self.parameters()] if self.together else [self.backbone.parameters(), self.head.parameters()]
        return [torch.optim.SGD(part, lr=self.lr) for part in parts]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "wrapped"])
@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "plain"])
def test_two_optimizers_in_manual_optimization(toggle: bool, raw: bool, tmp_path: Path) -> None:
    """The steps of each act on its own tensors, whatever a toggled optimizer has switched off."""
    module = Manual(raw, toggle)
    callback, watch = watched_fit(tmp_path, module)
    assert watch.evaluations == [1] * 8
    assert module.flags == [[True, True, not toggle, not toggle], [not toggle, not toggle, True, True]] * 4
    assert_projected_after_every_step(watch, callback)
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [4] * 4
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_radii_start_with_the_first_step_of_their_optimizer(tmp_path: Path) -> None:
    """At half of the smallest distance of that step."""
    callback, watch = watched_fit(tmp_path, Manual(), tpgm={"radius_lr": 1e-6}, limit_train_batches=1)
    for name, radius in callback.radii.items():
        weight = watch.steps["head" in name]["stepped"][name]
        smallest = row_distances(weight, callback.anchor[name], "mars").min().item()
        assert radius == pytest.approx(smallest / 2, abs=3e-6)


def test_every_n_steps_of_each_optimizer(tmp_path: Path) -> None:
    """Two that take turns do not take each other's turn."""
    callback, watch = watched_fit(tmp_path, Manual(), tpgm={"every_n_steps": 2})
    assert watch.evaluations == [1, 1, 0, 0] * 2
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [2] * 4
    assert_projected_after_every_step(watch, callback)


class GAN(Classifier):
    """A generator (the backbone) and a discriminator (the head) that step in turn.

    Args:
        early: Whether the generator's loss is computed before the discriminator steps, which torch forbids.
    """

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.early = early
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.backbone.append(nn.Linear(8, 8))  # behind another layer: its backward pass reads the weight

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        generator, discriminator = self.optimizers()
        fake = self.backbone(batch[0])
        adversarial = -self.head(fake).mean() if self.early else None
        discriminator.zero_grad()
        self.manual_backward(self.head(fake.detach()).square().mean() - self.head(-fake.detach()).mean())
        before = weights_of(self.backbone)
        discriminator.step()
        assert_same(weights_of(self.backbone), before)
        generator.zero_grad()
        self.manual_backward(-self.head(fake).mean() if adversarial is None else adversarial)
        generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.05) for part in (self.backbone, self.head)]


@pytest.mark.parametrize("make", [partial(TPGMCallback, loss=classifier_loss), FTPCallback, SPDCallback])
def test_graph_that_outlives_a_step_of_another_optimizer(make: Any, tmp_path: Path) -> None:
    """A step leaves other optimizers' weights alone: a graph through them stays valid and its gradient exact."""
    callback, module = make(), GAN()
    start = weights_of(module)
    trainer_in(tmp_path, callbacks=[callback]).fit(module, Blobs())
    assert all(not torch.equal(weight, start[name]) for name, weight in weights_of(module).items())
    if hasattr(callback, "radii"):
        assert_inside_balls(module, start, callback.radii)


@pytest.mark.parametrize("callbacks", [[], [TPGMCallback(loss=classifier_loss)]])
def test_graph_through_stepped_weights_is_refused_by_torch_itself(callbacks: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trainer_in(tmp_path, callbacks=callbacks).fit(GAN(early=True), Blobs())


def test_manual_optimization_equals_automatic(tmp_path: Path) -> None:
    runs = []
    for module in (Manual(together=True), Manual(together=True, raw=True), Classifier()):
        callback, watch = watched_fit(tmp_path, module, tpgm={"radius_steps": 2})
        runs.append([weights_of(module), callback.radii, callback.distances, watch.evaluations])
    assert_same(runs[0], runs[2])
    assert_same(runs[1], runs[2])


def test_optimizer_that_is_stepped_now_and_then(tmp_path: Path) -> None:
    class Module(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(self.loss(batch))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    callback, watch = watched_fit(tmp_path, Module(together=True), max_epochs=2)
    assert watch.evaluations == [1] * 4
    assert_projected_after_every_step(watch, callback)


def test_manual_optimization_needs_a_loss(tmp_path: Path) -> None:
    expected = r"cannot evaluate the training_step of a module with manual optimization.*Pass `loss`: 'validation_step'"
    with pytest.raises(MisconfigurationException, match=expected):
        trainer_in(tmp_path, callbacks=[TPGMCallback()]).fit(Manual(), Blobs())


class Decaying(torch.optim.SGD):
    """An optimizer that does more than the one it derives from, as users write it."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                with torch.no_grad():
                    parameter.mul_(0.999)
        return loss


def test_step_that_calls_the_inherited_one_counts_once(tmp_path: Path) -> None:
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # from now on torch calls the hooks twice
    module = Classifier()
    module.configure_optimizers = lambda: Decaying(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    callback = TPGMCallback(every_n_steps=1)
    trainer_in(tmp_path, callbacks=[callback]).fit(module, Blobs())
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [4] * 4
    assert_inside_balls(module, callback.anchor, callback.radii)


# --- others see projected weights only ---


def test_callback_listed_before_sees_projected_weights(tmp_path: Path) -> None:
    class Early(pl.Callback):
        seen = 0

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            assert_inside_balls(pl_module, callback.anchor, callback.radii)
            self.seen += 1

        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if self.seen:
                assert_inside_balls(pl_module, callback.anchor, callback.radii)

        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                assert_inside_balls(pl_module, callback.anchor, callback.radii)

    early, callback = Early(), TPGMCallback()
    trainer = trainer_in(tmp_path, callbacks=[early, callback], val_check_interval=2)
    trainer.fit(Classifier(lr=1.0), Blobs())
    assert early.seen == 4


# --- which parameters ---


def test_frozen_parameters_are_ignored(tmp_path: Path) -> None:
    module = Classifier()
    module.backbone.requires_grad_(False)
    before = weights_of(module)
    callback, _ = watched_fit(tmp_path, module)
    assert list(callback.radii) == ["head.weight", "head.bias"]
    after = weights_of(module)
    assert_same({n: after[n] for n in after if "backbone" in n}, {n: before[n] for n in before if "backbone" in n})
    assert not any(parameter.requires_grad for parameter in module.backbone.parameters())


def test_tied_parameters_have_one_radius(tmp_path: Path) -> None:
    """Under the first name; the tie holds, and the tensor is projected once."""

    class Tied(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(CLASSES, CLASSES, bias=False)
            self.second = nn.Linear(CLASSES, CLASSES, bias=False)
            with torch.no_grad():
                self.first.weight.copy_(torch.eye(CLASSES))
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(super().forward(x))))

    module = Tied()
    callback, watch = watched_fit(tmp_path, module, tpgm={"exclude": ["backbone.*", "head.*"]})
    assert list(callback.radii) == ["first.weight"]
    assert module.second.weight is module.first.weight
    assert_projected_after_every_step(watch, callback)


class TrainableOnly(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_parameters_that_are_unfrozen_later_join_then(tmp_path: Path) -> None:
    """With the anchor that they had at the start, and a radius and an Adam of their own age."""
    module = TrainableOnly()
    start = weights_of(module)
    names: list[list[str]] = []

    class Names(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            names.append(list(callback.radii))

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.1)
    callback = TPGMCallback(every_n_steps=1)
    callbacks = [finetuning, callback, Names()]
    trainer_in(tmp_path, max_epochs=3, callbacks=callbacks).fit(module, Blobs())
    head, backbone = ["head.weight", "head.bias"], ["backbone.0.weight", "backbone.0.bias"]
    assert names == [head, head, head + backbone]
    assert_same({name: callback.anchor[name] for name in start}, start)
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [12, 12, 4, 4]
    assert all(radius > 0 for radius in callback.radii.values())
    assert_inside_balls(module, start, callback.radii)
    for name, weight in weights_of(module).items():
        assert not torch.equal(weight, start[name])


def test_nothing_trainable_yet(tmp_path: Path) -> None:
    """All that is not excluded joins later: no error where a finetuning callback will unfreeze it, else one."""

    class Later(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.1)

    callback = TPGMCallback(exclude=["head.*"])
    trainer_in(tmp_path, max_epochs=2, callbacks=[callback, Later()]).fit(TrainableOnly(), Blobs())
    assert list(callback.radii) == ["backbone.0.weight", "backbone.0.bias"]

    module = TrainableOnly()
    module.backbone.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"nothing to constrain.*none of them is trainable"):
        trainer_in(tmp_path, callbacks=[TPGMCallback(exclude=["head.*"])]).fit(module, Blobs())


# --- after the fit ---


class Stop(Exception):
    pass


class StopInThirdBatch(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if args[-1] == 2:
            raise Stop


@pytest.mark.parametrize("end", ["completed", "exception", "held-out exception", "interrupt"])
def test_optimizer_is_left_alone_after_the_fit(end: str, tmp_path: Path) -> None:
    """A step that the user makes afterwards is a plain one."""
    calls: list[int] = []

    def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3 and end in ("held-out exception", "interrupt"):
            raise KeyboardInterrupt if end == "interrupt" else Stop
        return classifier_loss(pl_module, batch)

    module, callback = Classifier(), TPGMCallback(loss=own_loss, every_n_steps=1)
    callbacks = [callback, StopInThirdBatch()] if end == "exception" else [callback]
    trainer = trainer_in(tmp_path, callbacks=callbacks)
    # of the held-out data it comes with likely causes
    raised = MisconfigurationException if end == "held-out exception" else (Stop, SystemExit)
    with nullcontext() if end == "completed" else pytest.raises(raised):
        trainer.fit(module, Blobs())
    assert len(calls) == (4 if end == "completed" else 3)
    assert_inside_balls(module, callback.anchor, callback.radii)
    for name, weight in weights_of(module).items():  # also the last step came to its end
        farthest = row_distances(weight, callback.anchor[name], "mars").max().item()
        assert callback.distances[name] == pytest.approx(farthest, rel=1e-3, abs=1e-6)

    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = {name: weight.sub(torch.ones_like(weight), alpha=0.1) for name, weight in weights_of(module).items()}
    trainer.optimizers[0].step()
    assert_same(weights_of(module), expected)
    assert len(calls) == (4 if end == "completed" else 3)


def test_second_fit_acts_once_a_step(tmp_path: Path) -> None:
    """The hooks of the first fit are gone: none is doubled."""
    calls: list[int] = []

    def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
        calls.append(1)
        return classifier_loss(pl_module, batch)

    module, callback = Classifier(), TPGMCallback(loss=own_loss, every_n_steps=1)
    for fits in (1, 2):
        trainer_in(tmp_path, callbacks=[callback]).fit(module, Blobs())
        assert len(calls) == 4 * fits
