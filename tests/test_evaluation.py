"""The held-out loss: what a step may return, with what it is called, and its gradient."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lightning_tpgm import TPGMCallback
from lightning_tpgm.callbacks.evaluation import HeldOutLoss
from lightning_tpgm.callbacks.heldout import HeldOutBatch
from lightning_tpgm.callbacks.isolation import Isolation
from properties import assert_same
from toys import Blobs, Classifier, blobs, classifier_loss, trainer_in, weights_of

BATCH = list(blobs(8, seed=2)[:])
FIRST = HeldOutBatch(BATCH, 0, 0)


class Evaluate(pl.Callback):
    """Evaluates the held-out loss once, in the middle of a fit."""

    def __init__(self, held_out_loss: HeldOutLoss, drawn: HeldOutBatch) -> None:
        self.held_out_loss, self.drawn = held_out_loss, drawn

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        named = dict(pl_module.named_parameters())
        with Isolation().no_trace(trainer, pl_module):
            self.loss, grads = self.held_out_loss(trainer, pl_module, self.drawn, list(named.values()))
        self.grads = dict(zip(named, grads, strict=True))


def evaluate(
    tmp_path: Path,
    module: pl.LightningModule,
    loss: Any = None,
    drawn: HeldOutBatch = FIRST,
    data: pl.LightningDataModule | None = None,
) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """The held-out loss and its gradients after one training step."""
    evaluation = Evaluate(HeldOutLoss(loss), drawn)
    trainer_in(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[evaluation]).fit(module, data or Blobs())
    return evaluation.loss, evaluation.grads


class Labelled(Tensor):
    """A tensor of a library's own."""


class Returns(Classifier):
    """Returns something else on held-out data, which are recognised by eval mode."""

    def __init__(self, held_out: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.held_out = held_out

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return loss if self.training else self.held_out(loss)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.held_out(self.loss(batch))


# --- values ---


@pytest.mark.parametrize("step", [None, "validation_step", "callable"])
@pytest.mark.parametrize(
    "held_out",
    [
        lambda loss: loss,
        lambda loss: loss.reshape(1, 1),
        lambda loss: {"loss": loss, "logits": None},
        lambda loss: loss.as_subclass(Labelled),
    ],
    ids=["scalar", "one entry", "dict", "subclass"],
)
def test_loss_and_gradient_are_those_of_the_module(step: str | None, held_out: Any, tmp_path: Path) -> None:
    module = Returns(held_out)
    loss: Any = step if step != "callable" else lambda pl_module, batch: held_out(pl_module.loss(batch))
    value, grads = evaluate(tmp_path, module, loss)
    expected = module.loss(BATCH)
    expected_grads = torch.autograd.grad(expected, list(module.parameters()))
    assert_same(value, expected.detach())
    assert not value.requires_grad
    assert_same(list(grads.values()), list(expected_grads))


def test_gradient_of_what_the_loss_does_not_depend_on_is_none(tmp_path: Path) -> None:
    module = Classifier()
    module.unused = nn.Parameter(torch.ones(2))
    _, grads = evaluate(tmp_path, module)
    assert [name for name, grad in grads.items() if grad is None] == ["unused"]


def test_none_of_the_training_step_skips_the_update(tmp_path: Path) -> None:
    """Lightning's own way of saying "skip this batch": the radii stay, the weights are projected all the same."""
    value, grads = evaluate(tmp_path, Returns(lambda loss: None))
    assert value is None
    assert set(grads.values()) == {None}

    skipping, once = TPGMCallback(every_n_steps=1), TPGMCallback(every_n_steps=1000)

    def from_the_second_on(loss: Tensor) -> Tensor | None:
        calls.append(1)
        return loss if len(calls) == 1 else None

    calls: list[int] = []
    found = fit(tmp_path, Returns(from_the_second_on), skipping)
    expected = fit(tmp_path, Classifier(), once)
    assert len(calls) == 4
    assert_same_but_position(skipping, once)
    assert_same(found, expected)


def fit(tmp_path: Path, module: pl.LightningModule, callback: TPGMCallback, **settings: Any) -> dict[str, Tensor]:
    """Four training steps; the weights after them. Validation plays no part, so that its step may return anything."""
    settings = {"limit_val_batches": 0, "callbacks": [callback], **settings}
    trainer_in(tmp_path, **settings).fit(module, Blobs())
    return weights_of(module)


def assert_same_but_position(found: TPGMCallback, expected: TPGMCallback) -> None:
    """All that was learned, the counts of Adam included."""
    one, other = found.state_dict()["method"], expected.state_dict()["method"]
    assert_same(one["radii"], other["radii"])
    assert_same(found.distances, expected.distances)


# --- errors ---


WRONG: list[tuple[Any, str]] = [
    (lambda loss: loss.item(), r"found 'float'"),
    (lambda loss: torch.stack([loss, loss]), r"found a tensor of shape \(2,\)"),
    (lambda loss: {"objective": loss}, r"found a dict with the keys \['objective'\]"),
    (lambda loss: {"loss": loss.item()}, r"found a dict with the keys \['loss'\]"),
    (lambda loss: (loss, loss), r"found 'tuple'"),
    (lambda loss: "no loss", r"found 'str'"),
]


@pytest.mark.parametrize("step", [None, "validation_step", "callable"])
@pytest.mark.parametrize(("held_out", "found"), WRONG)
def test_wrong_return_is_an_error(held_out: Any, found: str, step: str | None, tmp_path: Path) -> None:
    source = {None: "training_step", "callable": "loss callable"}.get(step, step)
    loss: Any = step if step != "callable" else lambda pl_module, batch: held_out(pl_module.loss(batch))
    expected = rf"The {source} should return the loss.*\(a scalar tensor, or a dict.*{found}\. .*another `loss`: None"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(tmp_path, Returns(held_out), TPGMCallback(loss=loss))


@pytest.mark.parametrize("step", ["validation_step", "callable"])
def test_none_is_an_error_where_it_does_not_mean_skip(step: str, tmp_path: Path) -> None:
    loss: Any = step if step != "callable" else lambda pl_module, batch: None
    with pytest.raises(MisconfigurationException, match=r"should return the loss.* found 'NoneType'"):
        fit(tmp_path, Returns(lambda loss: None), TPGMCallback(loss=loss))


@torch.no_grad()
def without_graph(pl_module: Classifier, batch: Any) -> Tensor:
    return pl_module.loss(batch)


def of_frozen_weights(pl_module: Classifier, batch: Any) -> Tensor:
    return pl_module.loss(batch).detach() + pl_module.frozen.sum()


@pytest.mark.parametrize("loss", [without_graph, of_frozen_weights, lambda pl_module, batch: torch.ones(())])
def test_loss_without_gradient_is_an_error(loss: Any, tmp_path: Path) -> None:
    module = Classifier()
    module.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    expected = r"held-out loss of the loss callable has no gradient: it is detached.*another `loss`"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(tmp_path, module, TPGMCallback(loss=loss))


def test_error_of_the_step_itself_comes_through(tmp_path: Path) -> None:
    def fails(loss: Tensor) -> Tensor:
        raise RuntimeError("the user's own mistake")

    with pytest.raises(MisconfigurationException, match="the user's own mistake") as caught:
        fit(tmp_path, Returns(fails), TPGMCallback())
    assert type(caught.value.__cause__) is RuntimeError
    assert str(caught.value.__cause__) == "the user's own mistake"


def test_error_of_the_gradient_itself_comes_through(tmp_path: Path) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("the user's own backward")

    with pytest.raises(MisconfigurationException, match="the user's own backward") as caught:
        fit(tmp_path, Returns(Fails.apply), TPGMCallback())
    assert type(caught.value.__cause__) is RuntimeError
    assert str(caught.value.__cause__) == "the user's own backward"


# --- not finite ---


def infinite(loss: Tensor) -> Tensor:
    return loss * float("inf")


def not_a_number(loss: Tensor) -> Tensor:
    return loss * float("nan")


def gradient_not_a_number(loss: Tensor) -> Tensor:
    """A finite loss: the square root of 0, whose slope is infinite, times 0."""
    return loss + (0 * loss).sqrt()


@pytest.mark.parametrize("bad", [infinite, not_a_number, gradient_not_a_number])
def test_update_that_is_not_finite_is_skipped_with_one_warning(bad: Any, tmp_path: Path) -> None:
    """From the second update on all are bad: what is learned is what one update gives, and training goes on."""
    calls: list[int] = []

    def bad_from_the_second_on(loss: Tensor) -> Tensor:
        calls.append(1)
        return loss if len(calls) == 1 else bad(loss)

    skipping, once = TPGMCallback(every_n_steps=1), TPGMCallback(every_n_steps=1000)
    with pytest.warns(UserWarning, match="not finite: that radius update was skipped, training goes on") as caught:
        found = fit(tmp_path, Returns(bad_from_the_second_on), skipping, max_epochs=2)
    assert sum("held-out" in str(warning.message) for warning in caught) == 1
    expected = fit(tmp_path, Classifier(), once, max_epochs=2)
    assert len(calls) == 8
    assert_same_but_position(skipping, once)
    assert_same(found, expected)


def test_update_after_a_skipped_one_is_made(tmp_path: Path) -> None:
    """One bad batch costs one update, no more: Adam then counts one less, and all its values are finite."""
    calls: list[int] = []

    def bad_once(loss: Tensor) -> Tensor:
        calls.append(1)
        return not_a_number(loss) if len(calls) == 2 else loss

    callback = TPGMCallback(every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite"):
        fit(tmp_path, Returns(bad_once), callback)
    radii = callback.state_dict()["method"]["radii"]
    assert len(calls) == 4
    assert radii["step"].tolist() == [3] * 4
    assert all(radii[name].isfinite().all() for name in ("value", "exp_avg", "exp_avg_sq"))


# --- how the step is called ---


calls: list[Any] = []  # not on the module, where it would be put back


class Called(Classifier):
    """Keeps with what its steps were called on held-out data."""

    def note(self, *args: Any) -> None:
        if not self.training:
            calls.append(args)


class OnlyBatch(Called):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        self.note()
        return self.loss(batch)


class BatchAndIndex(Called):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note(batch_idx)
        return self.loss(batch)


class OtherNames(Called):
    def training_step(self, data: Any, number: int) -> Tensor:  # type: ignore[override]
        self.note(number)
        return self.loss(data)


class AnyNumber(Called):
    def training_step(self, batch: Any, *args: Any) -> Tensor:
        self.note(*args)
        return self.loss(batch)


class LoaderIndex(Called):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.note(batch_idx, dataloader_idx)
        return self.loss(batch)


class ThirdOfItsOwn(Called):
    """Lightning never fills a third argument of the training step, so it may mean anything."""

    def training_step(self, batch: Any, batch_idx: int, stage: str = "train") -> Tensor:
        self.note(batch_idx, stage)
        return self.loss(batch)


class MoreOfItsOwn(Called):
    def training_step(self, batch: Any, batch_idx: int, *names: str, **flags: bool) -> Tensor:
        self.note(batch_idx, *names, *flags)
        return self.loss(batch)


def decorator(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def decorated(*args: Any) -> Any:
        return step(*args)

    return decorated


class Decorated(Called):
    @decorator
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.note(batch_idx, dataloader_idx)
        return self.loss(batch)


SIGNATURES = [
    (OnlyBatch, ()),
    (BatchAndIndex, (5,)),
    (OtherNames, (5,)),
    (AnyNumber, (5,)),
    (LoaderIndex, (5, 3)),
    (ThirdOfItsOwn, (5, "train")),
    (MoreOfItsOwn, (5,)),
    (Decorated, (5, 3)),
]


@pytest.mark.parametrize(("module", "expected"), SIGNATURES)
def test_training_step_gets_the_arguments_that_it_asks_for(module: Any, expected: Any, tmp_path: Path) -> None:
    calls.clear()
    evaluate(tmp_path, module(), drawn=HeldOutBatch(BATCH, 5, 3))
    assert calls == [expected]


def test_validation_step_gets_the_index_of_the_loader_under_any_name(tmp_path: Path) -> None:
    """Lightning fills a third argument by position where there are several loaders."""

    class Module(Called):
        def validation_step(self, batch: Any, batch_idx: int, source: int) -> Tensor:  # type: ignore[override]
            self.note(batch_idx, source)
            return self.loss(batch)

    calls.clear()
    evaluate(tmp_path, Module(), "validation_step", HeldOutBatch(BATCH, 5, 3))
    assert calls == [(5, 3)]


hooks: list[tuple[str, int]] = []


class Transfers:
    """Hooks of a batch's transfer, of a module or a datamodule."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        hooks.append(("before", dataloader_idx))
        return [10 * batch[0], batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        hooks.append(("transfer", dataloader_idx))
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        hooks.append(("after", dataloader_idx))
        return [1 + batch[0], batch[1]]


class TransferringModule(Transfers, Classifier):
    pass


class TransferringData(Transfers, Blobs):
    pass


@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_transfer_hooks_are_applied(owner: str, tmp_path: Path) -> None:
    module = TransferringModule() if owner == "module" else Classifier()
    data = TransferringData() if owner == "datamodule" else Blobs()
    hooks.clear()
    with warnings.catch_warnings():  # Lightning says which of the two it takes
        warnings.filterwarnings("ignore", "You have overridden")
        value, _ = evaluate(tmp_path, module, drawn=HeldOutBatch(BATCH, 0, 3), data=data)
    assert_same(value, module.loss([1 + 10 * BATCH[0], BATCH[1]]).detach())
    assert hooks[-3:] == [("before", 3), ("transfer", 3), ("after", 3)]


# --- the gradient under checkpointing and compilation ---


class Checkpointed(Classifier):
    """Recomputes the head's input in the backward pass; draws random numbers in its step."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.middle[0].reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        if self.use_reentrant is None:
            return self.head(self.middle(x))
        return self.head(checkpoint(self.middle, x, use_reentrant=self.use_reentrant))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.rand(len(x), 1) + random.random() + float(np.random.rand())
        return cross_entropy(self(x + 0.1 * noise), y)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, tmp_path: Path) -> None:
    """Reentrant checkpointing refuses torch.autograd.grad: all `.grad` are put aside, and put back as they were."""
    kept: list[tuple[nn.Parameter, Any, Any]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            kept.extend((p, p.grad, p.grad.clone()) for p in pl_module.parameters())

    results = []
    for reentrant in (use_reentrant, None):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        evaluation = Evaluate(HeldOutLoss(None), FIRST)
        trainer = trainer_in(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[Keep(), evaluation])
        trainer.fit(Checkpointed(reentrant), Blobs())
        results.append((evaluation.loss, evaluation.grads))
    assert_same(results[0], results[1])
    assert all(grad is not None for grad in results[0][1].values())
    for parameter, grad, value in kept:
        assert parameter.grad is grad
        assert torch.equal(grad, value)


def test_hooks_of_the_users_gradients_do_not_run(tmp_path: Path) -> None:
    """An optimizer that steps in the backward pass, or the reduction over processes, hangs on such hooks."""
    module, count = Classifier(), [0]

    def hook(parameter: Tensor) -> None:
        count[0] += 1

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    evaluate(tmp_path, module)
    assert count == [4]  # those of the training step


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_checkpointing_gives_the_same_radii(norm: Any, use_reentrant: bool, tmp_path: Path) -> None:
    """Also where the step draws random numbers: the attempt that reentrant checkpointing refuses counts for nothing."""
    runs = []
    for reentrant in (use_reentrant, None):
        callback = TPGMCallback(norm=norm, radius_steps=2)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        weights = fit(tmp_path, Checkpointed(reentrant), callback)
        runs.append((weights, callback.radii, callback.state_dict()["method"]))
    assert_same(runs[0], runs[1])


def test_compiled_submodule_gives_the_same_radii(tmp_path: Path) -> None:
    """In-place changes of its weights reach the compiled code, and the names are those of the plain module."""

    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.compile(self.backbone, backend="eager")

    runs = []
    for module in (Compiled(), Classifier()):
        callback = TPGMCallback(radius_steps=2)
        weights = fit(tmp_path, module, callback)
        runs.append((list(weights.values()), callback.radii, callback.distances))
    assert list(runs[0][1]) == ["backbone.0.weight", "backbone.0.bias", "head.weight", "head.bias"]
    assert_same(runs[0], runs[1])


def test_held_out_loss_is_that_at_the_projected_weights(tmp_path: Path) -> None:
    """In mid-step the module holds the projected weights, in eval mode, and the caller's own loss sees them."""
    seen: list[tuple[bool, bool]] = []

    def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
        radii, anchors = callback.radii, callback.anchor
        inside = [
            (parameter - anchors[name]).abs().flatten(min(1, parameter.dim() - 1)).sum(-1).max().item()
            <= radii[name] * (1 + 1e-5) + 1e-6
            for name, parameter in pl_module.named_parameters()
        ]
        seen.append((all(inside), pl_module.training))
        return classifier_loss(pl_module, batch)

    callback = TPGMCallback(loss=own_loss, radius_steps=3, every_n_steps=1)
    fit(tmp_path, Classifier(lr=1.0), callback)
    assert seen == [(True, False)] * 12
