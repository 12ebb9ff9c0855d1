"""Leads: variants of TPGM's rule that might serve users better, tried in the settings of the benchmark.

They reach into the package, so that it need not carry options that lose. A variant that wins on at least two suites by
more than twice the standard error becomes an option.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

import lightning_tpgm.callbacks.tpgm
from lightning_tpgm import TPGMCallback
from lightning_tpgm.layout import Matrices
from lightning_tpgm.projection import EPS
from lightning_tpgm.radii import Radii
from methods import Method, over


class LogRadii(Radii):
    """Adam moves log(gamma), so an update does not depend on the scale of a tensor's distances."""

    @override
    def adam(self, grad: Tensor, where: Tensor) -> None:
        """dLoss/dlog(gamma) = gamma dLoss/dgamma."""
        radius = self.value
        super().adam(radius * grad, where)
        self.value = radius * torch.exp(self.value - radius)


class LogTPGM(TPGMCallback):
    """Learns log(gamma)."""

    @override
    def reset_method(self) -> None:
        """Uses such radii."""
        super().reset_method()
        self._radii = LogRadii(self.radius_lr)


def left_derivative(dot: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    """The radius gradient of each row with the rows at the boundary counted: a radius at its bound can shrink."""
    return torch.where(radius <= distance, dot / (distance + EPS), 0)


class BoundaryTPGM(TPGMCallback):
    """Takes the left derivative at the boundary."""

    @override
    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Does so by that gradient."""
        with mock.patch.object(lightning_tpgm.callbacks.tpgm, "radius_slope", left_derivative):
            super().after_optimizer_step(trainer, pl_module, optimizer)


class WideTPGM(TPGMCallback):
    """Starts every radius at the largest distance of the first step, not at half of the smallest."""

    @override
    def _measure(self, weights: Matrices, copies: Matrices | None = None) -> tuple[Tensor, Tensor]:
        """Starts the radii, too."""
        distances, largest = super()._measure(weights, copies)
        self._radii.start(largest)
        return distances, largest


class RelativeTPGM(TPGMCallback):
    """An update moves a radius by a share of the tensor's present distance, so one rate fits every scale and norm."""

    @override
    def _measure(self, weights: Matrices, copies: Matrices | None = None) -> tuple[Tensor, Tensor]:
        """Sets the rates, too."""
        distances, largest = super()._measure(weights, copies)
        self._radii.lr = self.radius_lr * largest  # type: ignore[assignment]  # one of each tensor
        return distances, largest


LEADS = (
    Method("log radius, mars", over(radius_lr=(0.03, 0.1)), partial(LogTPGM, norm="mars")),
    Method("log radius, l2", over(radius_lr=(0.03, 0.1)), partial(LogTPGM, norm="l2")),
    Method("relative rate, mars", over(radius_lr=(0.1,)), partial(RelativeTPGM, norm="mars")),
    Method("relative rate, l2", over(radius_lr=(0.1,)), partial(RelativeTPGM, norm="l2")),
    Method("boundary gradient, l2", over(radius_lr=(0.01,)), partial(BoundaryTPGM, norm="l2")),
    Method("wide start, mars", over(radius_lr=(0.1,)), partial(WideTPGM, norm="mars")),
    Method("head not constrained, mars", ({"radius_lr": 0.1, "free_head": True},), TPGMCallback),
    Method("half of the held-out data, mars", ({"radius_lr": 0.1, "held_out": 0.5},), TPGMCallback),
)
