"""WiSE-FT: the interpolation, the sweep over alphas, its result object and its figure."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tpgm import WiSEFTCallback, WiSEFTSweep, wise_ft_sweep
from properties import assert_same
from reference import wise_ft
from toys import Toy, quiet_trainer, toy, train_loader, val_loader

EXACT = {"rtol": 1e-6, "atol": 1e-7}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def interpolated(pretrained: dict[str, Tensor], finetuned: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """What the reference gives, in the dtypes of the module."""
    return {name: value.to(finetuned[name].dtype) for name, value in wise_ft(pretrained, finetuned, alpha).items()}


def trained(*callbacks: pl.Callback, seed: int = 0, **options: Any) -> Toy:
    """A fine-tuned toy; the same one whatever acts at the end of the fit."""
    module = toy(seed)
    quiet_trainer(*callbacks, **options).fit(module, train_loader(), val_loader())
    return module


INTEGER = "backbone.1.num_batches_tracked"


# --- the callback ---


@pytest.mark.parametrize("alpha", [0, 1])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_endpoints_equal_the_two_models_to_the_bit(alpha: int, precision: str) -> None:
    """Parameters and running statistics; a count of batches cannot be interpolated and stays fine-tuned."""
    pretrained = toy().to({"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}[precision])
    finetuned = state(trained(precision=precision))
    found = state(trained(WiSEFTCallback(alpha=alpha), precision=precision))
    assert_same(found, finetuned if alpha else {**state(pretrained), INTEGER: finetuned[INTEGER]})
    assert finetuned[INTEGER] == 6


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_interpolation_formula(alpha: float) -> None:
    found = state(trained(WiSEFTCallback(alpha=alpha)))
    torch.testing.assert_close(found, interpolated(state(toy()), state(trained()), alpha), **EXACT)
    assert not torch.equal(found["backbone.1.running_var"], state(trained())["backbone.1.running_var"])


def test_excluded_tensors_keep_their_fine_tuned_value() -> None:
    finetuned = state(trained())
    found = state(trained(WiSEFTCallback(alpha=0.0, exclude=["head.*", "*.running_*"])))
    start = state(toy())
    for name, value in found.items():
        kept = name.startswith("head") or "running" in name or name == INTEGER
        assert_same(value, (finetuned if kept else start)[name])


def test_a_new_head_keeps_its_fine_tuned_value_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    pretrained = {name: value for name, value in state(toy(1)).items() if not name.startswith("head")}
    with caplog.at_level(logging.INFO):
        found = state(trained(WiSEFTCallback(alpha=0.0, pretrained=pretrained)))
    assert "WiSEFTCallback: Not constrained, because `pretrained` lacks them: head.weight, head.bias." in caplog.text
    finetuned = state(trained())
    assert_same(found, {**finetuned, **pretrained, INTEGER: finetuned[INTEGER]})


def test_pretrained_that_is_not_where_the_fit_started() -> None:
    found = state(trained(WiSEFTCallback(alpha=0.25, pretrained=toy(3))))
    torch.testing.assert_close(found, interpolated(state(toy(3)), state(trained()), 0.25), **EXACT)


def test_which_checkpoints_hold_which_weights(tmp_path: Path) -> None:
    """Those written during the fit are fine-tuned, one saved after it is interpolated."""
    module = toy()
    trainer = quiet_trainer(
        WiSEFTCallback(alpha=0.5), ModelCheckpoint(tmp_path, filename="during"), enable_checkpointing=True
    )
    trainer.fit(module, train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    during, after = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in ("during", "after"))
    assert_same(dict(during), state(trained()))
    assert_same(dict(after), state(module))


def test_an_interrupted_fit_is_not_interpolated() -> None:
    class Stop(Exception):
        pass

    class StopAtEnd(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            raise Stop

    module = toy()
    with pytest.raises(Stop):
        quiet_trainer(WiSEFTCallback(alpha=0.0), StopAtEnd()).fit(module, train_loader(), val_loader())
    assert_same(state(module), state(trained()))


# --- the sweep ---


class Scored(Toy):
    """Its validation metric is best at the alpha that the head's bias shows: a peak at a known place."""

    pretrained_bias: float
    finetuned_bias: float
    peak = 0.3
    fail_at: float | None = None

    @property
    def alpha(self) -> float:
        return (float(self.head.bias[0]) - self.pretrained_bias) / (self.finetuned_bias - self.pretrained_bias)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fail_at is not None and abs(self.alpha - self.fail_at) < 1e-4:
            raise RuntimeError("broken validation")
        self.log("score", 1 - abs(self.alpha - self.peak))
        self.log("distance", abs(self.alpha - self.peak))


def scored() -> tuple[Scored, dict[str, Tensor], dict[str, Tensor]]:
    """A fine-tuned module and both of its ends."""
    pretrained, finetuned = state(toy()), state(trained())
    module = Scored()
    module.load_state_dict(finetuned)
    module.pretrained_bias, module.finetuned_bias = (float(end["head.bias"][0]) for end in (pretrained, finetuned))
    return module, pretrained, finetuned


@pytest.mark.parametrize(("monitor", "mode"), [("score", "max"), ("distance", "min")])
def test_sweep_finds_the_best_alpha_and_leaves_the_module_there(monitor: str, mode: Any) -> None:
    module, pretrained, finetuned = scored()
    sweep = wise_ft_sweep(quiet_trainer(), module, pretrained, monitor, mode=mode, dataloaders=val_loader())
    assert (sweep.monitor, sweep.mode) == (monitor, mode)
    assert sweep.alphas == tuple(i / 10 for i in range(11))
    away = [abs(alpha - 0.3) for alpha in sweep.alphas]
    assert sweep.values == pytest.approx([1 - d for d in away] if mode == "max" else away, abs=1e-4)
    assert sweep.best_alpha == 0.3
    torch.testing.assert_close(state(module), interpolated(pretrained, finetuned, 0.3), **EXACT)


@pytest.mark.parametrize("peak", [0.0, 1.0])
def test_sweep_ends_are_the_two_models_to_the_bit(peak: float) -> None:
    module, pretrained, finetuned = scored()
    module.peak = peak
    sweep = wise_ft_sweep(quiet_trainer(), module, pretrained, "score", alphas=[0, 0.5, 1], dataloaders=val_loader())
    assert sweep.best_alpha == peak
    assert_same(state(module), finetuned if peak else {**pretrained, INTEGER: finetuned[INTEGER]})


def test_sweep_measures_with_the_users_own_validation() -> None:
    """Each value is what the module's validation gives at these weights, from its own loaders or a datamodule."""

    class Data(pl.LightningDataModule):
        def val_dataloader(self) -> Any:
            return val_loader()

    finetuned = trained()
    module = toy()
    module.load_state_dict(finetuned.state_dict())
    trainer = quiet_trainer()
    sweep = wise_ft_sweep(trainer, module, toy(), "val_loss", alphas=[0.2, 0.8], mode="min", datamodule=Data())
    for alpha, value in zip(sweep.alphas, sweep.values, strict=True):
        at = toy()
        at.load_state_dict(interpolated(state(toy()), state(finetuned), alpha))
        (metrics,) = quiet_trainer().validate(at, val_loader(), verbose=False)
        assert value == pytest.approx(metrics["val_loss"], rel=1e-5)


def test_sweep_restores_the_fine_tuned_weights_when_validation_raises() -> None:
    module, pretrained, finetuned = scored()
    module.fail_at = 0.4
    with pytest.raises(RuntimeError, match="broken validation"):
        wise_ft_sweep(quiet_trainer(), module, pretrained, "score", dataloaders=val_loader())
    assert_same(state(module), finetuned)


def test_sweep_monitor_that_is_not_logged() -> None:
    module, pretrained, finetuned = scored()
    message = r"^`monitor` should be a metric that validation logs, found 'acc'\. Logged are \['distance', 'score'\]\.$"
    with pytest.raises(MisconfigurationException, match=message):
        wise_ft_sweep(quiet_trainer(), module, pretrained, "acc", dataloaders=val_loader())
    assert_same(state(module), finetuned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": []}, r"^`alphas` should be numbers in \[0, 1\], at least one, found \[\]\."),
        ({"alphas": [0.5, 2]}, r"^`alphas` should be numbers in \[0, 1\], .*, found \[0.5, 2\]\."),
        ({"mode": "best"}, "^`mode` should be 'max' or 'min', found 'best'"),
        ({"exclude": ["haed"]}, "^`exclude` pattern 'haed' matches no parameter"),
        ({"pretrained": {"a": torch.zeros(2)}}, "^`pretrained` matches no parameter by name and shape"),
        ({"pretrained": "nowhere.ckpt"}, "^`pretrained` should be an existing file"),
    ],
)
def test_sweep_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    module, pretrained, finetuned = scored()
    with pytest.raises(MisconfigurationException, match=message):
        wise_ft_sweep(quiet_trainer(), module, **{"pretrained": pretrained, "monitor": "score", **arguments})
    assert_same(state(module), finetuned)


def test_sweep_after_a_fit_with_the_callback() -> None:
    """The workflow that WiSEFTCallback(alpha=None) is for: the fit changes nothing, the sweep knows the anchor."""
    callback, module = WiSEFTCallback(alpha=None, exclude=["head.*"]), toy()
    trainer = quiet_trainer(callback)
    trainer.fit(module, train_loader(), val_loader())
    finetuned = state(module)
    assert_same(finetuned, state(trained()))

    sweep = wise_ft_sweep(trainer, module, callback.anchor, "val_loss", mode="min", dataloaders=val_loader())
    torch.testing.assert_close(state(module), interpolated(callback.anchor, finetuned, sweep.best_alpha), **EXACT)
    assert_same(state(module.head), state(trained().head))
    (metrics,) = trainer.validate(module, val_loader(), verbose=False)
    assert metrics["val_loss"] == pytest.approx(min(sweep.values), rel=1e-6)


# --- the result ---


def test_best_alpha_among_equals_is_the_smallest() -> None:
    assert WiSEFTSweep("acc", "max", (0.8, 0.2, 0.5), (0.9, 0.9, 0.1)).best_alpha == 0.2
    assert WiSEFTSweep("loss", "min", (0.0, 0.5, 1.0), (2.0, 1.0, 1.0)).best_alpha == 0.5


@pytest.mark.parametrize("mode", ["max", "min"])
def test_best_alpha_is_not_one_whose_metric_is_not_a_number(mode: Any) -> None:
    assert WiSEFTSweep("acc", mode, (0.0, 0.5, 1.0), (float("nan"), 0.5, float("nan"))).best_alpha == 0.5


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = WiSEFTSweep("acc", "max", (0.0, 0.5, 1.0), (0.1, 0.3, 0.2)).plot()
    curve, best = axes.get_lines()
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0.0, 0.5, 1.0], [0.1, 0.3, 0.2])
    assert set(best.get_xdata()) == {0.5}
    assert (axes.get_ylabel(), axes.figure) == ("acc", figure)
    plt.close(figure)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r"^Plots need matplotlib: pip install 'lightning-tpgm\[plots\]'\.$"
    with pytest.raises(ModuleNotFoundError, match=message):
        WiSEFTSweep("acc", "max", (0.0, 1.0), (0.1, 0.3)).plot()
