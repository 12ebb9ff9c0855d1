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
            TPGM's radii also grow by a factor at most, see `learn`.

    Attributes:
        reach: The largest row distance of each tensor before its last projection, shape (T,).
        distance: The same after it.
        pace: How far an optimizer step carries each tensor: a running mean of ``|n - n'|``, not corrected for its start
            at zero. There n is the largest row distance after the step, and n' that after the last projection.
        followed: How many steps that is the mean of, shape (T,).
        projections: How often each tensor was projected, shape (T,).
        bound: How often that changed it.
        pinned: How often that took back nearly all: the tensor was held at its anchor.
        wanted: Its distance before a projection, the mean of all.
        allowed: Its distance after a projection, the mean of all.

    Raises:
        ValueError: If ``lr`` is neither.
    """

    SHARE = 0.5  # of the pace that a radius keeps
    SMOOTHING = 0.95  # of the pace
    GROWTH = 1.5**0.25  # by which factor a radius may grow in an optimizer step
    FREE = 0.2  # of the rate, which is a tenth of the pace: so large it may become at once
    HOLDS = 0.1  # a projection that leaves less of a tensor's deviation holds it at its anchor
    _PACE = ("pace", "followed")
    _SEEN = ("projections", "bound", "pinned", "wanted", "allowed")
    _MORE = ("distance", "reach", *_PACE, *_SEEN)

    distance: Tensor
    reach: Tensor
    pace: Tensor
    followed: Tensor
    projections: Tensor
    bound: Tensor
    pinned: Tensor
    wanted: Tensor
    allowed: Tensor

    def __init__(self, lr: RadiusLr) -> None:
        number = is_number(lr) and lr > 0  # type: ignore[operator]  # only a number is compared
        check(number or lr == "auto", "radius_lr", "a positive number or 'auto'", lr)
        self.keeps_pace = not number
        super().__init__(float(lr) if number else math.nan)

    def follow(self, largest: Tensor, moved: Tensor) -> None:
        """Note how far a step has carried those of these tensors that it moved, before they are projected."""
        if self.keeps_pace:
            step = (largest - self.distance).abs()
            known = moved & (self.reach > 0) & (step < torch.inf)  # False for what is not a number
            self.pace = torch.where(known, torch.lerp(self.pace, step, 1 - self.SMOOTHING), self.pace)
            self.followed = self.followed + known

    @property
    def growth(self) -> float:
        """By how much a radius can grow in an update, whatever the data say; infinite if it keeps pace."""
        return math.inf if self.keeps_pace else self.lr

    @property
    def rate(self) -> Tensor | None:
        """How far each radius may move for an optimizer step, 0 where no pace is known. None: Adam's rate."""
        if not self.keeps_pace:
            return None
        return self.SHARE * self.pace / -torch.expm1(self.followed.clamp(min=1) * math.log(self.SMOOTHING))

    def learn(self, slope: Tensor, where: Tensor, steps: float) -> None:
        """An update while training, for so many optimizer steps; see `adam`.

        A radius that keeps pace grows by the factor `GROWTH` a step at most, but up to a share `FREE` of the rate at
        once. The first slopes mostly say "farther". Without a bound, radii would go along with an optimizer whose steps
        are far too large, before a slope can say "too far".
        """
        rate, before = self.rate, self.value
        if rate is None:
            self.adam(slope, where)
            return
        growth = self.GROWTH ** min(steps, 100)  # a larger factor bounds nothing, and could overflow
        self.adam(slope, where, steps * rate)
        self.value = self.value.minimum(torch.maximum(growth * before, self.FREE * rate))

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
        left = ratio(self.bounds, self.reach)
        self.distance = left * self.reach
        self.projections = self.projections + moved
        bound = moved & self._binds
        self.bound = self.bound + bound
        self.pinned = self.pinned + (bound & (left < self.HOLDS))
        finite = moved & (self.reach < torch.inf)  # False for what is not a number
        share = self.projections.reciprocal()
        for name, now in (("wanted", self.reach), ("allowed", self.distance)):
            mean = getattr(self, name)
            setattr(self, name, torch.where(finite, mean.lerp(now, share), mean))

    @property
    def _binds(self) -> Tensor:
        return self.value < self.reach

    @property
    def _ratios(self) -> Tensor:
        return torch.where(self._binds, ratio(self.value, self.reach), 1)

    def quantities(self, over_steps: bool = True) -> dict[str, Tensor]:
        """What users see, see `lightning_tpgm.observing.reporting`. With ``over_steps`` also shares of the steps."""
        found = {"radius": self.value, "distance": self.distance, "ratio": self._ratios, "binds": self._binds}
        found |= {"wanted": self.wanted, "allowed": self.allowed}
        if over_steps:
            found |= {"bound": self.bound / self.projections, "pinned": self.pinned / self.projections}
        return found

    def method_state(self) -> dict[str, Any]:
        """Radii with their Adam state, the last distances and the counts, as they stand in checkpoints."""
        more = {name: getattr(self, name).cpu() for name in (*self._SEEN, *(self._PACE if self.keeps_pace else ()))}
        return {"radii": self.state_dict(), "distances": self.distance.cpu(), "reach": self.reach.cpu(), **more}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take over what `method_state` gave."""
        self.load_state_dict(state["radii"])
        self.distance = state["distances"]
        self.reach = state.get("reach", self.distance)  # older checkpoints have none
        for name in (*self._SEEN, *self._PACE):  # nor counts, nor have those of another rate a pace
            setattr(self, name, state.get(name, torch.zeros_like(self.distance)))
