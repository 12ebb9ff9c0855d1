"""Leads: variants of TPGM's rule that might serve users better, tried in the settings of the benchmark.

They reach into the package, so that it need not carry options that lose. A variant that wins on at least two suites by
more than twice the standard error becomes an option.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import Tensor
from typing_extensions import override

import lightning_tpgm.methods.learned
from lightning_tpgm import TPGMCallback
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import TPGM, Step
from lightning_tpgm.methods.learned import Radii
from lightning_tpgm.projection import EPS
from methods import Method, over


class LogRadii(Radii):
    """Adam moves log(gamma), so an update does not depend on the scale of a tensor's distances."""

    @override
    def adam(self, grad: Tensor, where: Tensor) -> None:
        """dLoss/dlog(gamma) = gamma dLoss/dgamma."""
        radius = self.value
        super().adam(radius * grad, where)
        self.value = radius * torch.exp(self.value - radius)


class WideRadii(Radii):
    """Every radius starts at the largest distance of the first step, not at half of the smallest."""

    @override
    def start(self, value: Tensor, where: Tensor | bool = True) -> None:
        """Not yet."""

    @override
    def clamp(self, largest: Tensor, where: Tensor) -> None:
        """Starts the radii, too."""
        super().start(largest, where)
        super().clamp(largest, where)


class RelativeRadii(Radii):
    """An update moves a radius by a share of the tensor's present distance, so one rate fits every scale and norm."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.share = lr

    @override
    def clamp(self, largest: Tensor, where: Tensor) -> None:
        """Sets the rates, too."""
        self.lr = self.share * largest  # type: ignore[assignment]  # one of each tensor
        super().clamp(largest, where)


def left_derivative(dot: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    """The radius gradient of each row with the rows at the boundary counted: a radius at its bound can shrink."""
    return torch.where(radius <= distance, dot / (distance + EPS), 0)


class BoundaryTPGM(TPGM):
    """Takes the left derivative at the boundary."""

    @override
    def after(self, tensors: Constrained, step: Step) -> None:
        """Does so by that gradient."""
        with mock.patch.object(lightning_tpgm.methods.learned, "radius_slope", left_derivative):
            super().after(tensors, step)


class Lead(TPGMCallback):
    """TPGM with other radii, or another rule."""

    RADII: type[Radii] = Radii
    RULE: type[TPGM] = TPGM

    @override
    def make_method(self) -> TPGM:
        """The same method but for that."""
        method = super().make_method()
        method.__class__ = self.RULE
        method.radii = self.RADII(self.radius_lr)
        return method


class LogTPGM(Lead):
    """Learns log(gamma)."""

    RADII = LogRadii


class WideTPGM(Lead):
    """Starts wide."""

    RADII = WideRadii


class RelativeTPGM(Lead):
    """Has relative rates."""

    RADII = RelativeRadii


class BoundaryCallback(Lead):
    """Counts the boundary."""

    RULE = BoundaryTPGM


LEADS = (
    Method("log radius, mars", over(radius_lr=(0.03, 0.1)), partial(LogTPGM, norm="mars")),
    Method("log radius, l2", over(radius_lr=(0.03, 0.1)), partial(LogTPGM, norm="l2")),
    Method("relative rate, mars", over(radius_lr=(0.1,)), partial(RelativeTPGM, norm="mars")),
    Method("relative rate, l2", over(radius_lr=(0.1,)), partial(RelativeTPGM, norm="l2")),
    Method("boundary gradient, l2", over(radius_lr=(0.01,)), partial(BoundaryCallback, norm="l2")),
    Method("wide start, mars", over(radius_lr=(0.1,)), partial(WideTPGM, norm="mars")),
    Method("head not constrained, mars", ({"radius_lr": 0.1, "free_head": True},), TPGMCallback),
    Method("half of the held-out data, mars", ({"radius_lr": 0.1, "held_out": 0.5},), TPGMCallback),
)
