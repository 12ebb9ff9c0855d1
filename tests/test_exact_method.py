"""Invariant 2, "Exact method": radii and weights follow the papers, to the recordings and to independent loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle, islice

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import TPGMCallback
from parity_model import BATCH_SIZE, ParityModel, Recording, load_recording
from reference import ReferenceTPGM

SHAPES = {"scalar": (), "vector": (5,), "matrix": (4, 3), "cube": (2, 3, 2), "kernel": (3, 2, 2, 2), "unmoved": (2, 2)}


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], data: DataLoader, **options: object) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**quiet, enable_model_summary=False, callbacks=callbacks, **({"max_epochs": 1} | options))
    trainer.fit(module, data)


class Recorder(pl.Callback):
    """Keeps the radii after every batch."""

    def __init__(self, callback: TPGMCallback) -> None:
        self.callback = callback
        self.radii: list[dict[str, float]] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.radii.append(self.callback.radii)


# --- the recorded trajectory ---


class LitParity(pl.LightningModule):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.model = recording.model()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def assert_final(model: ParityModel, recording: Recording) -> None:
    for name, expected in recording.final.items():
        torch.testing.assert_close(
            model.state_dict()[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_exact_method_recorded_trajectory() -> None:
    recording = load_recording("tpgm_mars.npz")
    module = LitParity(recording)
    held_out = DataLoader(TensorDataset(recording.heldout_x, recording.heldout_y), BATCH_SIZE)
    callback = TPGMCallback(held_out, radius_lr=1e-2, every_n_steps=1, exclude=["*.head.*"])  # the authors'
    recorder = Recorder(callback)

    fit(module, [callback, recorder], DataLoader(TensorDataset(recording.train_x, recording.train_y), BATCH_SIZE))

    assert len(recorder.radii) == recording.steps == 24
    assert list(callback.radii) == [f"model.{name}" for name in recording.names]
    radii = torch.tensor([list(step.values()) for step in recorder.radii])
    torch.testing.assert_close(radii, recording.radii, rtol=1e-5, atol=1e-6)
    assert_final(module.model, recording)


# --- a float64 loop written from the method, over a grid ---


def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A smooth loss that couples all tensors; ``unmoved`` gets no gradient."""
    used = [weights[name] for name in SHAPES if name != "unmoved"]
    mixed = torch.cat([weight.flatten() for weight in used])
    return (mixed - x[: mixed.numel()]).square().mean() + torch.cos(mixed * x[: mixed.numel()]).sum() / 10


class Tensors(pl.LightningModule):
    """One parameter of every number of dimensions."""

    def __init__(self, scale: float, lr: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lr = lr
        for name, shape in SHAPES.items():
            value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return loss_of(dict(self.named_parameters()), batch[0][0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def reference_run(
    module: Tensors, reference: ReferenceTPGM, train: Tensor, held_out: Iterator[Tensor]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same training with the optimizer's steps and the projection written out."""
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def gradients(at: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in at.items()}
        grads = torch.autograd.grad(loss_of(leaves, x), list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))

    history = []
    for x in train:
        for name, grad in gradients(weights, x).items():
            if grad is not None:
                momentum[name] = 0.9 * momentum[name] + grad
                weights[name] = weights[name] - module.lr * momentum[name]
        projected = reference.after_step(weights, lambda at: gradients(at, next(held_out)))
        weights.update(projected)
        history.append(dict(reference.radii))
    return history, weights


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    lr=st.sampled_from([1e-4, 0.05, 0.5]),
    radius_lr=st.sampled_from([1e-4, 1e-2, 1.0, "auto", "auto"]),
    radius_steps=st.integers(1, 3),
    every_n_steps=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_exact_method_float64_loop(
    norm: str, scale: float, lr: float, radius_lr: float | str, radius_steps: int, every_n_steps: int, seed: int
) -> None:
    module = Tensors(scale, lr, seed)
    anchors = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(seed + 1)
    train, held_out = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (7, 4))
    reference = ReferenceTPGM(anchors, norm, radius_lr, radius_steps, every_n_steps)
    expected_radii, expected_weights = reference_run(module, reference, train, cycle(held_out))

    callback = TPGMCallback(
        DataLoader(TensorDataset(held_out)),
        norm=norm,
        radius_lr=radius_lr,
        radius_steps=radius_steps,
        every_n_steps=every_n_steps,
    )
    recorder = Recorder(callback)
    fit(module, [callback, recorder], DataLoader(TensorDataset(train)), precision="64-true")

    # Adam divides by the root of a squared gradient: where a gradient is rounding noise, so is the radius
    for found, expected in zip(recorder.radii, expected_radii, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected_weights[name], rtol=1e-6, atol=1e-9)
    assert set(callback.radii) == set(SHAPES)
    assert math.isnan(callback.radii["unmoved"])


def test_radii_that_keep_pace_grow_by_a_factor_at_most() -> None:
    """All slopes say "farther", and the optimizer's steps are large: half as much again in four steps, or a tenth."""
    from lightning_tpgm.methods.radii import Radii

    radii = Radii("auto")
    radii.add(["usual", "first distance of next to nothing", "not updated"])
    radii.start(torch.tensor([1.0, 1e-8, 1.0]))
    where, farther = torch.tensor([True, True, False]), -torch.ones(3)
    found = [radii.value]
    for _ in range(6):
        radii.projected(torch.ones(3), moved=where)
        radii.follow(radii.distance + 10, moved=where)
        radii.learn(farther, where, steps=4)
        found.append(radii.value)
    usual, tiny, still = torch.stack(found).T.tolist()
    assert usual == pytest.approx([1.5**update for update in range(7)])
    assert tiny == pytest.approx([1e-8, *usual[:6]])
    assert still == [1.0] * 7
    radii.learn(farther, where, steps=1e6)  # a rare update
    assert radii.value.isfinite().all()


def test_exact_method_adam_equals_torch() -> None:
    """The radii's own Adam and `torch.optim.Adam` make the same steps, also for radii that join later."""
    from lightning_tpgm.methods.radii import Radii

    radii = Radii(lr=0.02)
    radii.add(["a", "b"])
    radii.start(torch.tensor([1.0, 2.0]))
    reference = [nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0, 3.0)]
    optimizers = [torch.optim.Adam([parameter], lr=0.02) for parameter in reference]
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        if step == 10:
            radii.add(["c"])
            radii.start(torch.tensor([7.0, 7.0, 3.0]))
        grad = torch.randn(len(radii.names), generator=generator) * 10.0 ** torch.randint(
            -6, 6, (1,), generator=generator
        )
        skip = step % 7 == 3
        radii.adam(grad, where=torch.tensor(not skip))
        for parameter, optimizer, value in islice(zip(reference, optimizers, grad, strict=False), 0 if skip else 3):
            parameter.grad = value.clone()
            optimizer.step()
    torch.testing.assert_close(radii.value, torch.stack(reference).detach(), rtol=1e-6, atol=1e-7)
