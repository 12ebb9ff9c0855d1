"""Every precision of the Trainer on one CPU process: radii and their gradients do not suffer from it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_tpgm import TPGMCallback
from properties import assert_inside_balls, assert_same
from toys import Blobs, Classifier, classifier_loss, trainer_in, weights_of

SCALE = 2.0**12


def precision_settings(precision: str) -> dict[str, Any]:
    """Lightning itself allows 16-mixed on a GPU only; with this plugin it runs on a CPU."""
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    return {"precision": precision}


def fit(tmp_path: Path, module: Classifier, precision: str, callback: TPGMCallback, **more: Any) -> dict[str, Tensor]:
    """Four steps; the weights after them."""
    settings = {**precision_settings(precision), "limit_val_batches": 0, "callbacks": [callback], **more}
    trainer_in(tmp_path, **settings).fit(module, Blobs())
    return weights_of(module)


# By precision: the dtypes of radii, weights and logits, and how far a radius gradient may be from that of 32-true,
# relative to the largest. Under bf16-true a step moves a weight by few units of its last place.
PRECISIONS = {
    "32-true": (torch.float32, torch.float32, torch.float32, 0.0),
    "64-true": (torch.float64, torch.float64, torch.float64, 1e-5),
    "16-mixed": (torch.float32, torch.float32, torch.float16, 0.002),
    "bf16-mixed": (torch.float32, torch.float32, torch.bfloat16, 0.03),
    "bf16-true": (torch.float32, torch.bfloat16, torch.bfloat16, 0.1),
}


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision: str, norm: Any, tmp_path: Path) -> None:
    """The radii have float32 at least, their gradient is that of 32-true (unscaled), the weights end in the ball."""
    seen: list[Any] = []

    def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
        seen.append((batch[0].dtype, pl_module(batch[0]).dtype))
        return classifier_loss(pl_module, batch)

    radii_dtype, weight_dtype, logits_dtype, tolerance = PRECISIONS[precision]
    callback, reference = TPGMCallback(loss=own_loss, norm=norm), TPGMCallback(norm=norm)
    weights = fit(tmp_path, Classifier(), precision, callback, max_steps=1)
    fit(tmp_path, Classifier(), "32-true", reference, max_steps=1)

    assert seen == [(weight_dtype, logits_dtype)]
    assert {weight.dtype for weight in weights.values()} == {weight_dtype}
    assert {anchor.dtype for anchor in callback.anchor.values()} == {weight_dtype}
    radii = callback.state_dict()["method"]["radii"]
    assert {radii[name].dtype for name in ("value", "exp_avg", "exp_avg_sq")} == {radii_dtype}
    gradient, expected = (c.state_dict()["method"]["radii"]["exp_avg"].double() for c in (callback, reference))
    assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()
    assert expected.abs().min() > 0


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_end_inside_the_ball(precision: str, norm: Any, tmp_path: Path) -> None:
    """Up to the rounding of the weights themselves: bf16-true stores each with a relative error of 2^-8."""
    callback, module = TPGMCallback(norm=norm), Classifier()
    weights = fit(tmp_path, module, precision, callback, max_epochs=2)
    assert_inside_balls(module, callback.anchor, callback.radii, norm)
    assert all(0 < radius < 1 for radius in callback.radii.values())
    assert not any(torch.equal(weights[name], anchor) for name, anchor in callback.anchor.items() if "head" in name)


# --- the gradient scaler ---


def too_large_a_loss(pl_module: Classifier, batch: Any) -> Tensor:
    """Finite, but not times the scale."""
    return classifier_loss(pl_module, batch) * 3e35


def too_large_a_gradient(pl_module: Classifier, batch: Any) -> Tensor:
    """The scaled loss is finite in float32, the gradients in float16 are not."""
    return classifier_loss(pl_module, batch) * 1e6


@pytest.mark.parametrize("loss", [too_large_a_loss, too_large_a_gradient])
def test_scaled_loss_that_is_not_finite_skips_the_update(loss: Any, tmp_path: Path) -> None:
    callback = TPGMCallback(loss=loss)
    with pytest.warns(UserWarning, match="not finite: that radius update was skipped"):
        weights = fit(tmp_path, Classifier(), "16-mixed", callback)
    radii = callback.state_dict()["method"]["radii"]
    assert not radii["step"].any()
    assert not radii["exp_avg"].any()
    assert all(weight.isfinite().all() for weight in weights.values())


def small_loss(pl_module: Classifier, batch: Any) -> Tensor:
    return classifier_loss(pl_module, batch) * 1e-6


def test_scale_saves_small_gradients(tmp_path: Path) -> None:
    """In float16 they would be 0; the scale lifts them while they are propagated."""
    gradients = []
    for precision in ("16-mixed", "32-true"):
        callback = TPGMCallback(loss=small_loss)
        fit(tmp_path, Classifier(), precision, callback, max_steps=1)
        gradients.append(callback.state_dict()["method"]["radii"]["exp_avg"])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.01, atol=0)
    assert gradients[1].abs().max() < 1e-7


def test_scaler_is_left_alone(tmp_path: Path) -> None:
    """Neither its scale nor its count of good steps is moved by held-out losses that overflow."""
    states = []
    for callbacks in ([TPGMCallback(loss=too_large_a_gradient)], []):
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer = trainer_in(tmp_path, limit_val_batches=0, plugins=[plugin], callbacks=callbacks)
        with pytest.warns(UserWarning, match="not finite") if callbacks else nullcontext():
            trainer.fit(Classifier(), Blobs())
        states.append(scaler.state_dict())
    assert states[1]["scale"] == 2 * SCALE
    assert_same(states[0], states[1])


# --- manual optimization ---


class Manual(Classifier):
    """Steps its optimizer within the training step, and so within the autocast region of that step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_manual_optimization_equals_automatic(precision: str, tmp_path: Path) -> None:
    runs = []
    for module in (Manual(), Classifier()):
        callback = TPGMCallback(loss=classifier_loss, radius_steps=2)
        weights = fit(tmp_path, module, precision, callback)
        runs.append([weights, callback.radii, callback.distances])
    assert_same(runs[0], runs[1])


def test_casts_that_autocast_has_cached_are_not_used(tmp_path: Path) -> None:
    """They are of the weights before the step."""

    class OwnRegion(Manual):
        def __init__(self, cache_enabled: bool) -> None:
            super().__init__()
            self.cache_enabled = cache_enabled

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.cache_enabled):
                super().training_step(batch, batch_idx)
                assert torch.is_autocast_cache_enabled() is self.cache_enabled

    runs = []
    for cache_enabled in (True, False):
        callback = TPGMCallback(loss=classifier_loss, radius_steps=2)
        weights = fit(tmp_path, OwnRegion(cache_enabled), "32-true", callback)
        runs.append([weights, callback.radii, callback.distances])
    assert_same(runs[0], runs[1])
