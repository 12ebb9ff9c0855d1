"""A sweep measures the weights that it sets, beside averages and exchanged buffers; a metric may say nothing."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_tpgm import TPGMCallback, WiSEFTCallback, WiSEFTSweep, constrain, wise_ft_sweep
from lightning_tpgm.callbacks.averages import WITH_A_SWAP, averages_held_still
from lightning_tpgm.callbacks.framework import callbacks_of
from lightning_tpgm.methods import WiSEFT
from properties import assert_same
from reference import wise_ft
from test_wise_ft import EXACT, interpolated, state
from toys import Toy, quiet_trainer, toy, train_loader, val_loader

NAN, INF = math.nan, math.inf
SWEEP: dict[str, Any] = {"alpha": "sweep", "monitor": "val_loss", "mode": "min", "alphas": [0, 0.5, 1]}
EMA = getattr(pl_callbacks, "EMAWeightAveraging", None)
needs_ema = pytest.mark.skipif(EMA is None, reason="this lightning has no WeightAveraging")


def fitted(*callbacks: pl.Callback, module: Any = None) -> tuple[Any, pl.Trainer]:
    module = module or toy()
    trainer = quiet_trainer(*callbacks, max_epochs=2)
    trainer.fit(module, train_loader(), val_loader())
    return module, trainer


def losses(pretrained: nn.Module, finetuned: dict[str, Tensor], alphas: Any = (0, 0.5, 1)) -> list[float]:
    """What the validation of a trainer without callbacks gives at each alpha."""
    found = []
    for alpha in alphas:
        at = toy()
        at.load_state_dict(interpolated(state(pretrained), finetuned, alpha))
        (metrics,) = quiet_trainer().validate(at, val_loader(), verbose=False)
        found.append(metrics["val_loss"])
    assert len(set(found)) == len(found)
    return found


# --- averages ---


def test_which_callbacks_swap() -> None:
    """By name, since older releases have none."""
    assert (getattr(pl_callbacks, WITH_A_SWAP, None) is None) == (EMA is None)


@needs_ema
def test_a_sweep_in_a_fit_measures_the_weights_it_sets_and_not_the_average() -> None:
    average, _ = fitted(EMA(decay=0.5))
    callback = WiSEFTCallback(**SWEEP)
    module, trainer = fitted(EMA(decay=0.5), callback)
    assert callback.sweep is not None
    assert callback.sweep.values == pytest.approx(losses(toy(), state(average)), rel=1e-5)
    chosen = callback.sweep.chosen_alpha
    assert chosen > 0
    torch.testing.assert_close(state(module), interpolated(state(toy()), state(average), chosen), **EXACT)
    assert len([c for c in callbacks_of(trainer) if isinstance(c, EMA)]) == 1


@needs_ema
def test_a_sweep_that_is_listed_before_the_average_measures_what_it_sets() -> None:
    """What the average does afterwards, a warning says."""
    plain, _ = fitted()
    callback = WiSEFTCallback(**SWEEP)
    with pytest.warns(UserWarning, match="List EMAWeightAveraging before WiSEFTCallback"):
        module, _ = fitted(callback, EMA(decay=0.5))
    assert callback.sweep is not None
    assert callback.sweep.values == pytest.approx(losses(toy(), state(plain)), rel=1e-5)
    assert_same(state(module), state(fitted(EMA(decay=0.5))[0]))


@needs_ema
@pytest.mark.parametrize("of_the_module", [False, True], ids=["of the trainer", "of the module"])
def test_a_sweep_after_a_fit_measures_the_weights_it_sets(of_the_module: bool) -> None:
    """Also if the module gives the trainer the average, the same one each time."""
    average = EMA(decay=0.5)

    class Averaged(Toy):
        def configure_callbacks(self) -> Any:
            return [average] if of_the_module else []

    module = Averaged()
    module.load_state_dict(toy().state_dict())
    module, trainer = fitted(*([] if of_the_module else [average]), module=module)
    end = state(module)
    arguments = {"mode": "min", "alphas": [0, 0.5, 1], "dataloaders": val_loader()}
    sweep = wise_ft_sweep(trainer, module, toy(), "val_loss", **arguments)
    assert sweep.values == pytest.approx(losses(toy(), end), rel=1e-5)
    torch.testing.assert_close(state(module), interpolated(state(toy()), end, sweep.chosen_alpha), **EXACT)
    assert average in callbacks_of(trainer)


@needs_ema
@pytest.mark.parametrize(
    "make",
    [
        lambda: WiSEFTCallback(alpha=0.0),
        lambda: WiSEFTCallback(**{**SWEEP, "mode": "max"}),
        lambda: TPGMCallback(when="fit_end", radius_steps=2),
        None,
    ],
    ids=["WiSE-FT", "sweep", "TPGM", "function"],
)
def test_what_acts_at_the_end_is_what_the_trainer_validates_and_saves(make: Any, tmp_path: Path) -> None:
    """And not the average from before it."""
    module, trainer = fitted(EMA(decay=0.5), *([make()] if make else []))
    if make is None:
        arguments = {"mode": "max", "alphas": [0, 0.5], "dataloaders": val_loader()}
        wise_ft_sweep(trainer, module, toy(), "val_loss", **arguments)
    found = state(module)
    assert not torch.equal(found["hidden.weight"], fitted(EMA(decay=0.5))[0].hidden.weight)
    (metrics,) = trainer.validate(module, val_loader(), verbose=False)
    (expected,) = quiet_trainer().validate(module, val_loader(), verbose=False)
    assert metrics == expected
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(dict(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]), found)
    trainer.fit_loop.max_epochs = 3
    if make is not None:
        trainer.fit(module, train_loader(), val_loader())


@needs_ema
def test_callbacks_come_back_in_their_order_also_after_an_error() -> None:
    trainer = quiet_trainer(EMA(), WiSEFTCallback())
    before = callbacks_of(trainer)
    held = ExitStack()
    held.enter_context(averages_held_still(trainer))
    assert callbacks_of(trainer) == [callback for callback in before if not isinstance(callback, EMA)]
    error = RuntimeError("broken")
    assert not held.__exit__(RuntimeError, error, None)
    assert callbacks_of(trainer) is before


# --- buffers ---


class Centred(Toy):
    """As in DINO: training assigns another tensor to a buffer in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.center = 0.9 * self.center + 0.1 * batch[1].mean(dim=0) + 0.1
        return self.loss(batch)


def centred() -> Centred:
    module = Centred()
    module.load_state_dict(toy().state_dict(), strict=False)
    return module


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_buffer_that_training_replaces_is_interpolated(alpha: float) -> None:
    plain, _ = fitted(module=centred())
    callback = WiSEFTCallback(alpha=alpha)
    module, _ = fitted(callback, module=centred())
    assert float(plain.center.abs().min()) > 0.1
    torch.testing.assert_close(module.center, alpha * plain.center, **EXACT)
    torch.testing.assert_close(state(module), interpolated(state(centred()), state(plain), alpha), **EXACT)
    (row,) = [row for row in callback.report() if row["name"] == "center"]
    assert row["distance"] == pytest.approx(float((alpha * plain.center).norm()), rel=1e-5)


def test_a_buffer_that_training_replaces_is_swept() -> None:
    plain, _ = fitted(module=centred())
    callback = WiSEFTCallback(**{**SWEEP, "alphas": [0.0, 0.25]})
    module, _ = fitted(callback, module=centred())
    assert callback.sweep is not None
    expected = interpolated(state(centred()), state(plain), callback.sweep.chosen_alpha)
    torch.testing.assert_close(state(module), expected, **EXACT)


def test_a_buffer_that_training_replaces_with_the_anchors_in_a_file(tmp_path: Path) -> None:
    torch.save(centred().state_dict(), tmp_path / "pretrained.pt")
    callback = WiSEFTCallback(alpha=0.0, pretrained=tmp_path / "pretrained.pt", save_anchor=False)
    module, _ = fitted(callback, module=centred())
    assert_same(module.center, torch.zeros(2))


def test_a_buffer_that_is_loaded_before_the_first_step_is_the_anchor() -> None:
    class Loads(Centred):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 0:
                self.center = torch.tensor([3.0, 4.0])

    module = Loads()
    module.load_state_dict(toy().state_dict(), strict=False)
    fitted(WiSEFTCallback(alpha=0.0), module=module)
    assert_same(module.center, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(("other", "kept"), [(torch.ones(3), True), (torch.ones(2, dtype=torch.float64), False)])
def test_a_buffer_of_another_shape_keeps_its_fine_tuned_value(other: Tensor, kept: bool) -> None:
    """Of another dtype it is interpolated."""

    class Grows(Centred):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.center = other.clone()
            return self.loss(batch)

    module = Grows()
    module.load_state_dict(toy().state_dict(), strict=False)
    fitted(WiSEFTCallback(alpha=0.25), module=module)
    assert_same(module.center, other if kept else 0.25 * other)


def test_a_plain_loop_finds_a_buffer_that_was_replaced() -> None:
    module = centred()
    constraint = constrain(module, WiSEFT(0.5))
    module.center = torch.ones(2)
    constraint.finish()
    assert_same(module.center, torch.full((2,), 0.5))
    constraint.remove()
    assert constraint._model is None


def test_a_sweep_finds_buffers_that_a_move_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an accelerator: parameters stay the same objects, buffers do not."""
    finetuned, _ = fitted()
    end = state(finetuned)

    def moved(module: nn.Module) -> None:
        before = module.backbone[1].running_mean
        module._apply(torch.clone)
        assert module.backbone[1].running_mean is not before

    there, back = SingleDeviceStrategy.model_to_device, SingleDeviceStrategy.teardown
    monkeypatch.setattr(SingleDeviceStrategy, "model_to_device", lambda self: (there(self), moved(self.model))[0])
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", lambda self: (moved(self.lightning_module), back(self))[1])
    arguments = {"mode": "min", "alphas": [0, 0.3, 0.6], "dataloaders": val_loader()}
    sweep = wise_ft_sweep(quiet_trainer(), finetuned, toy(), "val_loss", **arguments)
    monkeypatch.undo()
    assert sweep.values == pytest.approx(losses(toy(), end, sweep.alphas), rel=1e-5)
    expected = {
        name: value.to(end[name].dtype) for name, value in wise_ft(state(toy()), end, sweep.chosen_alpha).items()
    }
    torch.testing.assert_close(state(finetuned), expected, **EXACT)


# --- metrics that say nothing ---


class Constant(Toy):
    value = NAN

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.value))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("in_fit", [True, False])
@pytest.mark.parametrize("alphas", [[0, 0.5, 1], [0, 0.5]])
def test_a_metric_that_is_never_finite_keeps_the_fine_tuned_weights(value: float, in_fit: bool, alphas: Any) -> None:
    plain, trainer = fitted()
    module = Constant()
    module.value = value
    module.load_state_dict((toy() if in_fit else plain).state_dict())
    callback = WiSEFTCallback(**{**SWEEP, "alphas": alphas})
    message = rf"^'val_loss' is finite at none of {len(alphas)} alphas.*fine-tuned weights stay.*Give `monitor`"
    arguments = {"mode": "min", "alphas": alphas, "dataloaders": val_loader()}

    def swept() -> WiSEFTSweep | None:
        if not in_fit:
            return wise_ft_sweep(trainer, module, toy(), "val_loss", **arguments)
        fitted(callback, module=module)
        return callback.sweep

    with pytest.warns(UserWarning, match=message):
        sweep = swept()
    assert_same(state(module), state(plain))
    assert sweep is not None
    assert (sweep.chosen_alpha, sweep.best_alpha) == (1.0, 1.0)


@pytest.mark.parametrize("values", [(NAN, NAN), (INF, INF), (-INF, -INF), (NAN, INF), (-INF, NAN), (INF, -INF)])
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("tolerance", [0.0, 0.5, NAN])
def test_without_a_finite_value_the_fine_tuned_end_is_chosen(values: Any, mode: Any, tolerance: float) -> None:
    for alphas in ((0.0, 1.0), (0.0, 0.5)):
        sweep = WiSEFTSweep("loss", mode, alphas, values, tolerance)
        assert (sweep.chosen_alpha, sweep.best_alpha) == (1.0, 1.0)


def test_the_picture_without_a_finite_value() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = WiSEFTSweep("acc", "max", (0.0, 0.5), (NAN, NAN), 0.1).plot()
    figure.canvas.draw()
    assert "chosen and best: 1" in [text.get_text() for text in axes.texts]
    plt.close(figure)


def test_a_metric_that_is_the_same_everywhere_is_said() -> None:
    """Else what evaluates other weights, an average of the module's own for instance, would undo the fine-tuning."""
    module = Constant()
    module.value = 0.5
    message = r"^'val_loss' is 0\.5 at each of 3 alphas.*alpha = 0.*other weights than those of the module"
    arguments = {"mode": "min", "dataloaders": val_loader()}
    with pytest.warns(UserWarning, match=message):
        sweep = wise_ft_sweep(quiet_trainer(), module, toy(), "val_loss", alphas=[0, 0.5, 1], **arguments)
    assert sweep.chosen_alpha == 0
    wise_ft_sweep(quiet_trainer(), module, toy(), "val_loss", alphas=[0.5], **arguments)  # one alpha: no warning


class Masks(Toy):
    """Its step replaces a buffer of numbers by one of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mask = torch.tensor([True, False, True])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, SWEEP], ids=["alpha", "sweep"])
def test_a_buffer_that_is_no_number_any_more_keeps_its_value(options: dict[str, Any]) -> None:
    module, _ = fitted(WiSEFTCallback(**options), module=Masks())
    assert module.mask.tolist() == [True, False, True]


@needs_ema
def test_a_sweep_that_fails_leaves_the_average() -> None:
    average = EMA(decay=0.5)
    module, trainer = fitted(average)
    kept = average._average_model
    with pytest.raises(Exception, match="no_such_metric"):
        wise_ft_sweep(trainer, module, toy(), monitor="no_such_metric", dataloaders=val_loader())
    assert average._average_model is kept
