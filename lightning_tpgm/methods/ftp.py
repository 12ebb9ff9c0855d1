"""FTP: Fast Trainable Projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Matrices
from lightning_tpgm.methods.last_step import LastStep
from lightning_tpgm.methods.method import Method, Step, check, is_number
from lightning_tpgm.methods.radii import Radii, RadiusLr
from lightning_tpgm.norms import NORMS, Norm
from lightning_tpgm.projection import EPS, MIN_RADIUS


class FTP(Method):
    """Learns radii as TPGM does, from the next training gradient: no held-out data, no extra forward or backward.

    After step t, with g the gradient that the step used, c the deviation before the projection and n its row norms +
    1e-8::

        t = 1:  gamma = 1e-8 (the first step snaps back to the anchor)
        t > 1:  dgamma = sum over rows of <g_t, c_(t-1)> / n_(t-1);  if dgamma > 0: dgamma *= k
                gamma  = clip(Adam(gamma, dgamma), 1e-8, max n_t)
        W := W0 + clip(gamma / n_t, 0, 1) c_t

    The derivative is that of the loss at the projected weights of step t - 1, which is where g_t is taken. A tensor
    that a step leaves out (it has no gradient) is left out here too.

    Args:
        k: Factor in [0, 1] on gradients that would shrink a radius. 1 is the strongest constraint. At 0 radii never
            shrink by gradient.
        radius_lr: Adam learning rate of the radii (the authors': 0.01), or ``"auto"``, as in `TPGM`. Their growth has
            no bound, since they start at 1e-8.
        norm: ``"mars"`` or ``"l2"``, as in `TPGM`.

    Raises:
        ValueError: For an argument out of its range.

    Source: Tian et al., "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023, arXiv 2310.19182.
    """

    has_radii = True
    reads_gradients = True

    def __init__(self, k: float = 1.0, radius_lr: RadiusLr = "auto", norm: Norm = "mars") -> None:
        check(is_number(k) and 0 <= k <= 1, "k", "a number in [0, 1]", k)
        check(norm in NORMS, "norm", f"one of {', '.join(map(repr, NORMS))}", norm)
        self.k, self.norm = k, norm
        self.radii = Radii(radius_lr)
        self.unprojected = LastStep()
        self._last_rows: tuple[Constrained, Tensor] | None = None  # those that were stepped last, and their distances

    @override
    def joined(self, tensors: Constrained, names: Sequence[str]) -> None:
        self.radii.add(names)

    @override
    def after(self, tensors: Constrained, step: Step) -> None:
        """Updates the radii from the gradient that the step used, and projects the weights."""
        grads, weights, before = tensors.gradients(), tensors.weights(), self.unprojected.of(tensors)
        present = [grad is not None for grad in grads]
        stepped, known = tensors.which(present), self.unprojected.known(tensors)
        rows_before = self._rows_of(tensors, before)
        kept = self.unprojected.memory(tensors, present)
        dots, sums = tensors.step_sums(weights, before, grads, kept)
        rows = tensors.distances(sums)
        slope = tensors.total(dots / (rows_before + EPS))  # dgamma; 0 without gradient, meaningless if not known
        largest = tensors.largest(rows)
        with self.radii.of(tensors) as radii:
            radii.start(torch.full_like(radii.value, MIN_RADIUS), where=stepped)
            if known is not tensors.every:  # for some it is t = 1, and Adam counts the optimizer's steps
                radii.step = radii.step + (stepped & ~known)
            radii.follow(largest, stepped)
            radii.adam(torch.where(slope > 0, self.k * slope, slope), where=stepped & known, lr=radii.rate)
            radii.clamp(largest + EPS, where=stepped)
            tensors.project(weights, rows, radii.bounds, moved=present)
            radii.projected(largest, moved=stepped)
        if stepped is not tensors.every:
            rows = torch.where(tensors.of_rows(stepped), rows, rows_before)
        self._last_rows = None if tensors.are_coarse else (tensors, rows)  # None: the rounded deviations count

    def _rows_of(self, tensors: Constrained, before: Matrices) -> Tensor:
        """n of every row before the last projection: known, if these tensors were the last ones to be stepped."""
        if self._last_rows is not None and self._last_rows[0] is tensors:
            return self._last_rows[1]
        return tensors.sizes(before)

    @override
    def quantities(self, tensors: Constrained) -> dict[str, Tensor]:
        """What the radii tell."""
        return self.radii.quantities()

    @override
    def growth(self) -> float:
        """Adam's step is at most about its learning rate."""
        return self.radii.growth

    @override
    def state(self) -> dict[str, Any]:
        return {**self.radii.method_state(), "unprojected": self.unprojected.state()}

    @override
    def load(self, state: dict[str, Any]) -> None:
        self.radii.load_method_state(state)
        # older checkpoints have the weights themselves: the next step learns nothing
        self.unprojected.load({} if "previous" in state else state["unprojected"])
        self._last_rows = None

    @override
    def release(self) -> None:
        self._last_rows = None
        super().release()
