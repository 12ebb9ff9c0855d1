"""The radii of all constrained tensors, and the automatic rate: each radius keeps pace with its tensor."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Matrices
from lightning_tpgm.methods.learned import LearnedScalars
from lightning_tpgm.methods.method import check, is_number
from lightning_tpgm.projection import legal_radius, radius_slope, ratio

RadiusLr = float | Literal["auto"]


class Radii(LearnedScalars):
    """The radii of all constrained tensors, and where their tensors were at the last projection.

    Args:
        lr: Adam's learning rate. ``"auto"``: each radius keeps pace with its tensor. If all slopes agree, an update
            moves it half as far as the optimizer carried the tensor since the last one. If they do not, it moves less:
            by the slopes' mean over their root mean square. So the rate has the scale of norm, layer and optimizer.

    Attributes:
        reach: The largest row distance of each tensor before its last projection, shape (T,).
        distance: The same after it.
        pace: How far an optimizer step carries each tensor: a running mean of ``|n - n'|``, not corrected for its start
            at zero. There n is the largest row distance after the step, and n' that after the last projection.
        followed: How many steps that is the mean of, shape (T,).

    Raises:
        ValueError: If ``lr`` is neither.
    """

    SHARE = 0.5  # of the pace that a radius keeps
    SMOOTHING = 0.95  # of the pace
    _PACE = ("pace", "followed")
    _MORE = ("distance", "reach", *_PACE)

    distance: Tensor
    reach: Tensor
    pace: Tensor
    followed: Tensor

    def __init__(self, lr: RadiusLr) -> None:
        number = is_number(lr) and lr > 0  # type: ignore[operator]  # only a number is compared
        check(number or lr == "auto", "radius_lr", "a positive number or 'auto'", lr)
        self.keeps_pace = not number
        super().__init__(float(lr) if number else math.nan)

    def follow(self, largest: Tensor, moved: Tensor) -> None:
        """Note how far a step has carried those of these tensors that it moved, before they are projected."""
        if self.keeps_pace:
            step = (largest - self.distance).abs()
            known = moved & (self.reach > 0) & step.isfinite()
            self.pace = torch.where(known, torch.lerp(self.pace, step, 1 - self.SMOOTHING), self.pace)
            self.followed = torch.where(known, self.followed + 1, self.followed)

    @property
    def growth(self) -> float:
        """By how much a radius can grow in an update, whatever the data say; infinite if it keeps pace."""
        return math.inf if self.keeps_pace else self.lr

    def rates(self, steps: float) -> Tensor | None:
        """How far each radius may move in an update, for so many optimizer steps an update; None: Adam's rate."""
        if not self.keeps_pace:
            return None
        mean = self.pace / -torch.expm1(self.followed * math.log(self.SMOOTHING))
        return torch.where(self.followed > 0, self.SHARE * steps * mean, 0)

    def clamp(self, largest: Tensor, where: Tensor) -> None:
        """Make radii legal, if ``where`` is true: [1e-8, largest row distance], see `projection.legal_radius`."""
        self.value = torch.where(where, legal_radius(self.value, largest), self.value)

    @property
    def bounds(self) -> Tensor:
        """The radii, infinite where there is none yet."""
        return self.value.nan_to_num(nan=torch.inf)

    def slope(self, tensors: Constrained, gradients: Matrices, weights: Matrices, rows: Tensor) -> Tensor:
        """dLoss/dgamma of each tensor, shape (T,); collective where tensors are split over processes.

        Args:
            tensors: Those of these radii.
            gradients: G, of the loss at the projected weights.
            weights: W, before the projection.
            rows: Their distances, from `Constrained.rows`.
        """
        return tensors.total(radius_slope(tensors.dots(gradients, weights), rows, tensors.of_rows(self.value)))

    def projected(self, largest: Tensor, moved: Tensor) -> None:
        """Note the largest distances after a projection, from those before it, of the tensors that were moved."""
        self.reach = torch.where(moved, largest, self.reach)
        self.distance = ratio(self.bounds, self.reach) * self.reach

    def quantities(self) -> dict[str, Tensor]:
        """Radius, distance, ratio and whether it binds, as after the last projection."""
        binds = self.value < self.reach
        ratios = torch.where(binds, ratio(self.value, self.reach), 1)
        return {"radius": self.value, "distance": self.distance, "ratio": ratios, "binds": binds}

    def method_state(self) -> dict[str, Any]:
        """Radii with their Adam state, and the last distances, as they stand in checkpoints."""
        more = {name: getattr(self, name).cpu() for name in (self._PACE if self.keeps_pace else ())}
        return {"radii": self.state_dict(), "distances": self.distance.cpu(), "reach": self.reach.cpu(), **more}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take over what `method_state` gave."""
        self.load_state_dict(state["radii"])
        self.distance = state["distances"]
        self.reach = state.get("reach", self.distance)  # older checkpoints have none
        for name in self._PACE:  # nor have those of another rate
            setattr(self, name, state.get(name, torch.zeros_like(self.distance)))
