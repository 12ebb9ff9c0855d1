"""Methods together: what works, and what is refused with the reason."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_tpgm.groups
from lightning_tpgm import (
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
    wise_ft_sweep,
)
from properties import assert_inside_ball, assert_same
from reference import ReferenceL2SP, ReferenceTPGM, wise_ft
from toys import Toy, images, quiet_trainer, toy, train_loader, val_loader

HEAD = ["head.*"]
REST = ["backbone.*", "norm.*", "hidden.*", "scale"]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def trained(*callbacks: pl.Callback, **options: Any) -> Toy:
    torch.manual_seed(0)
    module = toy()
    quiet_trainer(*callbacks, **{"max_epochs": 2, **options}).fit(module, train_loader(), val_loader())
    return module


def anchors(names: Any) -> dict[str, Tensor]:
    start = dict(toy().named_parameters())
    return {name: start[name] for name in names}


# --- TPGM and WiSE-FT ---


@pytest.mark.parametrize("when", ["training", "fit_end"])
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_wise_ft_after_tpgm(when: Any, norm: Any) -> None:
    """The projected weights are interpolated, and are inside the balls still: shrunk ones even."""
    projected = trained(TPGMCallback(norm=norm, when=when))
    tpgm = TPGMCallback(norm=norm, when=when)
    found = trained(tpgm, WiSEFTCallback(alpha=0.5))
    expected = wise_ft(state(toy()), state(projected), 0.5)
    torch.testing.assert_close(
        state(found), {n: value.to(state(found)[n].dtype) for n, value in expected.items()}, rtol=1e-6, atol=1e-7
    )
    assert_inside_ball(found, anchors(tpgm.radii), tpgm.radii, norm)
    assert_inside_ball(found, anchors(tpgm.radii), {n: radius / 2 for n, radius in tpgm.radii.items()}, norm)


def test_wise_ft_before_tpgm_at_fit_end() -> None:
    """In the order of the list: here the radii are learned for the interpolated weights."""
    tpgm = TPGMCallback(when="fit_end", radius_steps=3)
    found = trained(WiSEFTCallback(alpha=0.5), tpgm)
    assert_inside_ball(found, anchors(tpgm.radii), tpgm.radii, "mars")
    assert not torch.equal(found.hidden.weight, trained(WiSEFTCallback(alpha=0.5)).hidden.weight)


def test_a_sweep_after_tpgm() -> None:
    """The anchor of any method is the other end of a sweep."""
    torch.manual_seed(0)
    tpgm, module = TPGMCallback(), toy()
    trainer = quiet_trainer(tpgm)
    trainer.fit(module, train_loader(), val_loader())
    sweep = wise_ft_sweep(trainer, module, tpgm.anchor, "val_loss", mode="min", dataloaders=val_loader())
    assert len(sweep.values) == 11
    assert_inside_ball(module, anchors(tpgm.radii), tpgm.radii, "mars")


# --- two methods with a ball ---


@pytest.mark.parametrize("order", list(permutations([0, 1])))
def test_two_radii_for_the_same_parameters_are_refused(order: tuple[int, ...]) -> None:
    both = [TPGMCallback(exclude=HEAD), FTPCallback()]
    message = (
        r"both act on 9 tensors, 'backbone.0.bias' among them\."
        r" What the first does then counts twice, or for nothing\. Exclude them in one\.$"
    )
    with pytest.raises(MisconfigurationException, match=message) as error:
        trained(*(both[i] for i in order))
    assert str(error.value).startswith(f"{both[order[0]]!r} and {both[order[1]]!r} both")


@pytest.mark.parametrize("announced", [True, False], ids=["by BaseFinetuning", "by the module"])
def test_two_radii_for_a_backbone_that_thaws_later_are_refused(announced: bool) -> None:
    """Before the training where a finetuning callback says that it may come, else when it comes."""

    class Thaw(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            pl_module.backbone.requires_grad_(False)

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.backbone.requires_grad_(trainer.current_epoch == 1)

    seen: list[int] = []

    class Steps(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(trainer.global_step)

    thaw = BackboneFinetuning(1, train_bn=False) if announced else Thaw()
    both = [TPGMCallback(exclude=HEAD), FTPCallback(exclude=REST[1:])]
    with pytest.raises(MisconfigurationException, match=r"both act on 4 tensors, 'backbone\.0\.bias'"):
        trained(thaw, *both, Steps())
    assert len(seen) == (0 if announced else 6)


@pytest.mark.parametrize("order", list(permutations([0, 1])))
def test_two_radii_for_disjoint_parameters(order: tuple[int, ...]) -> None:
    tpgm, ftp = both = TPGMCallback(exclude=HEAD), FTPCallback(norm="l2", exclude=REST)
    module = trained(*(both[i] for i in order))
    assert set(tpgm.radii) | set(ftp.radii) == set(dict(toy().named_parameters()))
    assert set(ftp.radii) == {"head.weight", "head.bias"}
    for callback in both:
        assert_inside_ball(module, anchors(callback.radii), callback.radii, callback.norm)


def test_two_tpgms_with_different_settings() -> None:
    slow, fast = TPGMCallback(radius_lr=1e-4, exclude=HEAD), TPGMCallback(radius_lr=0.1, norm="l2", exclude=REST)
    module = trained(slow, fast)
    for callback in (slow, fast):
        assert_inside_ball(module, anchors(callback.radii), callback.radii, callback.norm)


@pytest.mark.parametrize("order", list(permutations([0, 1])))
def test_tpgm_at_fit_end_of_ftp(order: tuple[int, ...]) -> None:
    """One acts in the training, one after it: the weights are in both balls."""
    both = FTPCallback(), TPGMCallback(when="fit_end", norm="l2", radius_steps=2)
    module = trained(*(both[i] for i in order))
    for callback in both:
        assert_inside_ball(module, anchors(callback.radii), callback.radii, callback.norm)


# --- two callbacks of one method ---

ALL: list[type[Any]] = [TPGMCallback, FTPCallback, L2SPCallback, SPDCallback, DiGraPCallback, WiSEFTCallback]


@pytest.mark.parametrize("make", ALL)
def test_two_of_one_method_and_one_selection_are_refused_by_the_trainer(make: type[Any]) -> None:
    """By Lightning: a checkpoint would have one place for both. The page of troubles has the remedy."""
    first, second = make(exclude=HEAD), make(exclude=tuple(HEAD))
    with pytest.raises(RuntimeError, match=f"more than one stateful callback of type `{make.__name__}`"):
        quiet_trainer(L2SPCallback(exclude=REST), first, second)


@pytest.mark.parametrize("make", ALL)
def test_two_of_one_method_for_the_same_tensors_are_refused(make: type[Any]) -> None:
    first, second = make(exclude=HEAD), make(exclude=["backbone.*"])
    with pytest.raises(MisconfigurationException, match="both act on") as error:
        trained(first, second)
    assert str(error.value).startswith(f"{first!r} and {second!r} both")
    assert "'hidden.bias' among them" in str(error.value)
    assert str(error.value).endswith("Exclude them in one.")


def test_two_that_the_module_brings_are_refused() -> None:
    """Lightning does not compare the keys of those."""

    class Brings(Toy):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [L2SPCallback(0.1), L2SPCallback(0.2)]

    with pytest.raises(MisconfigurationException, match=r"both act on 11 tensors, 'backbone\.0\.bias' among them"):
        quiet_trainer().fit(Brings(), train_loader(), val_loader())


@pytest.mark.parametrize("make", ALL)
def test_two_of_one_method_for_disjoint_tensors(make: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each acts on its own ones, as one callback for all of them does."""
    monkeypatch.setattr(lightning_tpgm.groups, "SHARED", 0)  # sums have the order of each tensor alone
    torch.manual_seed(0)
    both = trained(make(exclude=HEAD), make(exclude=REST))
    if make is TPGMCallback:  # each draws held-out batches of its own, at weights that the other has not projected yet
        return
    assert_same(state(both), state(trained(make())))


def test_a_refused_pair_at_two_moments_is_none() -> None:
    """TPGM in the training and TPGM at its end leave the weights in both balls."""
    during, after = TPGMCallback(exclude=HEAD), TPGMCallback(when="fit_end", norm="l2", radius_steps=2)
    module = trained(during, after)
    for callback in (during, after):
        assert_inside_ball(module, anchors(callback.radii), callback.radii, callback.norm)


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, L2SPCallback])
def test_two_of_one_method_resume_in_any_order(make: type[Any], tmp_path: Any) -> None:
    """Each finds its own state by its `exclude`, and so does ModelCheckpoint beside them."""
    pair = [make(exclude=HEAD), make(exclude=REST)]
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    torch.manual_seed(0)
    trainer = quiet_trainer(*pair, best, enable_checkpointing=True)
    trainer.fit(toy(), train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = [(callback.report(), callback.anchor) for callback in reversed(pair)]
    again, found = [make(exclude=REST), make(exclude=HEAD)], []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            found.append([(callback.report(), callback.anchor) for callback in again])

    best_again = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best", save_top_k=0)
    resumed = quiet_trainer(*again, Look(), best_again, enable_checkpointing=True, max_epochs=2)
    resumed.fit(toy(1), train_loader(), val_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert_same(found[0], expected)
    assert best_again.best_model_path == best.best_model_path != ""


def test_a_pair_is_logged_apart() -> None:
    trainer = quiet_trainer(TPGMCallback(exclude=HEAD), TPGMCallback(exclude=REST), log_every_n_steps=1)
    trainer.fit(toy(), train_loader(), val_loader())
    names = {name.partition("/")[0] for name in trainer.callback_metrics}
    assert {"tpgm", "tpgm_2"} <= names


# --- TPGM and a method that changes gradients or weights beside it ---


@pytest.mark.parametrize("make", [L2SPCallback, DiGraPCallback, SPDCallback])
@pytest.mark.parametrize("tpgm_first", [True, False])
def test_tpgm_beside_another_method(make: type[pl.Callback], tpgm_first: bool) -> None:
    tpgm, beside = TPGMCallback(), make()
    module = trained(*([tpgm, beside] if tpgm_first else [beside, tpgm]))
    assert_inside_ball(module, anchors(tpgm.radii), tpgm.radii, "mars")
    assert not torch.equal(module.hidden.weight, trained(TPGMCallback()).hidden.weight)


class Quadratic(pl.LightningModule):
    """One matrix, pulled to what a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.weight - batch[0].mean(dim=(0, 1))).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("tpgm_first", [True, False])
def test_l2sp_beside_tpgm_against_a_float64_loop(tpgm_first: bool) -> None:
    """The penalty acts on the gradient, the projection on the weight that the step gave; the order is no matter."""
    module = Quadratic().double()
    tpgm, l2sp = TPGMCallback(val_loader(), norm="l2", radius_lr=0.02, every_n_steps=1), L2SPCallback(0.5)
    trainer = quiet_trainer(*([tpgm, l2sp] if tpgm_first else [l2sp, tpgm]), precision="64-true")
    trainer.fit(module, train_loader())

    anchor = {"weight": torch.zeros(4, 4, dtype=torch.float64)}
    ball, penalty = ReferenceTPGM(anchor, "l2", radius_lr=0.02), ReferenceL2SP(anchor, 0.5)
    held_out = images(10, seed=2).tensors[0].double().split(4) * 2

    def gradient(weight: Tensor, x: Tensor) -> dict[str, Tensor | None]:
        return {"weight": 2 * (weight - x.mean(dim=(0, 1)))}

    weights = anchor
    for x, held_out_x in zip(images(24, seed=1).tensors[0].double().split(4), held_out, strict=True):
        changed = penalty.change_gradients(weights, gradient(weights["weight"], x))
        stepped = {"weight": weights["weight"] - 0.1 * changed["weight"]}
        weights = ball.after_step(stepped, lambda at, x=held_out_x: gradient(at["weight"], x))
    torch.testing.assert_close(module.weight.detach(), weights["weight"], rtol=1e-9, atol=1e-12)
    assert tpgm.radii == pytest.approx(ball.radii, rel=1e-9)


def test_all_resume_together(tmp_path: Any) -> None:
    """Each finds its own state in the checkpoint."""

    def make() -> list[pl.Callback]:
        return [TPGMCallback(exclude=HEAD), FTPCallback(exclude=REST), L2SPCallback(), SPDCallback(), DiGraPCallback()]

    torch.manual_seed(0)
    expected = toy()
    quiet_trainer(*make(), max_epochs=2).fit(expected, train_loader(), val_loader())
    torch.manual_seed(0)
    trainer = quiet_trainer(*make(), max_epochs=1)
    trainer.fit(toy(), train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = toy(1)
    quiet_trainer(*make(), max_epochs=2).fit(found, train_loader(), val_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert_same(state(found), state(expected))
