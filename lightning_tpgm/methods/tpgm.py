"""TPGM: the Trainable Projected Gradient Method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Matrices
from lightning_tpgm.methods.held_out import HeldOut
from lightning_tpgm.methods.method import Method, Step, check, is_count
from lightning_tpgm.methods.radii import Radii, RadiusLr
from lightning_tpgm.norms import NORMS, Norm

When = Literal["training", "fit_end"]
CADENCE = 4  # the default of `every_n_steps`
UPDATES: dict[When, int] = {"training": 1, "fit_end": 200}  # the default of `radius_steps`


class TPGM(Method):
    """After every step W := W0 + r (W - W0), r = clip(gamma / (n + 1e-8), 0, 1); gamma is learned on held-out data.

    An update of a tensor's radius is a step of Adam. G is the gradient of the held-out loss at the projected weights.
    The derivative is a sum over the rows with 0 < gamma / (n_row + 1e-8) < 1::

        dLoss / dgamma = sum of <G_row, D_row> / (n_row + 1e-8)

    Args:
        radius_lr: Adam learning rate of the radii. The authors used 0.01 with ``every_n_steps=1``. ``"auto"``: each
            radius keeps pace with its tensor, see `lightning_tpgm.methods.radii.Radii`.
        norm: ``"mars"`` (maximum absolute row sum) or ``"l2"`` (Frobenius norm of the tensor), see `TPGMCallback`.
        radius_steps: Radius updates each time they are due. None: 1, and 200 with ``when="fit_end"``.
        every_n_steps: Radii are updated on every n-th step of each optimizer, the first included. Weights: on all.
        when: ``"training"``, or ``"fit_end"``: nothing after steps, and all ``radius_steps`` updates in `finish`.

    Attributes:
        held_out: Has to be set before the first step.
        progress: Wraps the updates that `finish` makes, for a progress bar.
        heldout_loss: Of the last update; None before.
        skipped: How many updates were skipped, because the held-out loss or its gradient was not finite.

    Raises:
        ValueError: For an argument out of its range.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, arXiv 2303.10720.
    """

    has_radii = True
    progress: Callable[[range], Sequence[int]] = staticmethod(lambda updates: updates)

    def __init__(
        self,
        radius_lr: RadiusLr = "auto",
        norm: Norm = "mars",
        radius_steps: int | None = None,
        every_n_steps: int = CADENCE,
        when: When = "training",
    ) -> None:
        self.radii = Radii(radius_lr)
        check(norm in NORMS, "norm", f"one of {', '.join(map(repr, NORMS))}", norm)
        check(when in get_args(When), "when", "'training' or 'fit_end'", when)
        radius_steps = UPDATES[when] if radius_steps is None else radius_steps
        check(is_count(radius_steps), "radius_steps", "a positive integer", radius_steps)
        check(is_count(every_n_steps), "every_n_steps", "a positive integer", every_n_steps)
        if when == "fit_end" and every_n_steps != CADENCE:
            raise ValueError(
                f"`every_n_steps` = {every_n_steps} has no effect with `when` = 'fit_end': no optimizer"
                " steps follow. Leave it out. `radius_steps` is the number of updates."
            )
        self.norm, self.radius_steps, self.every_n_steps = norm, radius_steps, every_n_steps
        self.acts_at_end = when == "fit_end"
        self.steps: dict[int, int] = {}  # seen of each optimizer, by its index
        self.held_out: HeldOut | None = None
        self.heldout_loss: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.long)
        self._to_come = False  # what `finish` learns

    @override
    def joined(self, tensors: Constrained, names: Sequence[str]) -> None:
        self.radii.add(names)

    @override
    def after(self, tensors: Constrained, step: Step) -> None:
        """Updates the radii of this optimizer's tensors if that is due, and projects these."""
        steps = self.steps.get(step.index, 0)
        self.steps[step.index] = steps + 1
        due = steps % self.every_n_steps == 0 and any(p.requires_grad for p in tensors.parameters)
        self._constrain(tensors, range(self.radius_steps if due else 0), step.moved(tensors))

    @override
    def finish(self, tensors: Constrained) -> None:
        """Learns the radii now, if that was asked for."""
        self._to_come = False
        if self.acts_at_end and tensors.names:
            self._constrain(tensors, self.progress(range(self.radius_steps)), tensors.every)

    def _constrain(self, tensors: Constrained, updates: Sequence[int], moved: Tensor) -> None:
        """Update the radii and project the weights."""
        if not tensors.names:
            return
        weights = tensors.keep() if updates else tensors.weights()  # in updates the parameters hold projections
        rows = tensors.rows(weights)
        largest = tensors.largest(rows)
        with self.radii.of(tensors) as radii:
            radii.start(tensors.smallest(rows) / 2, where=moved & (largest > 0))  # else it is still at its anchor
            radii.follow(largest, moved)
            try:
                for _ in updates:
                    radii.clamp(largest, where=moved)
                    tensors.project(weights, rows, radii.bounds)
                    slope, known = self._slope(radii, tensors, weights, rows)
                    learning = known & moved & (radii.value < torch.inf)  # False where there is no radius yet
                    if self.acts_at_end and radii.keeps_pace:  # in 200 about as far as the tensor has come
                        radii.adam(slope, learning, lr=largest / self.radius_steps)
                    else:
                        radii.learn(slope, learning, self.every_n_steps / self.radius_steps)
            finally:  # whatever happens, the weights are left inside the ball
                radii.clamp(largest, where=moved)
                tensors.project(weights, rows, radii.bounds)
                radii.projected(largest, moved)

    def _slope(self, radii: Radii, tensors: Constrained, weights: Matrices, rows: Tensor) -> tuple[Tensor, Tensor]:
        """dLoss/dgamma, and where it is known, shape (T,) each; the parameters hold the projections of ``weights``."""
        if self.held_out is None:
            raise ValueError("TPGM needs held-out data: a `held_out_loss` for `constrain`.")
        loss, grads = self.held_out(tensors.parameters)
        if loss is None and self.held_out.processes == 1:
            # "skip this batch". Several processes must go on together, and not a number skips it on all of them
            return radii.value, torch.zeros_like(radii.value, dtype=torch.bool)
        parts = tensors.arrange([tensors.part(grad, i) for i, grad in enumerate(grads)])
        slope = radii.slope(tensors, parts, weights, rows)
        value = radii.value.new_full((1,), torch.nan) if loss is None else loss.to(radii.value).reshape(1)
        used = tensors.which([grad is not None for grad in grads]).to(radii.value)
        mean = self.held_out.mean(torch.cat([value, slope, used]))
        slope, used = mean[1:].chunk(2)
        finite = mean.isfinite().all()
        self.heldout_loss, self.skipped = mean[0], self.skipped + ~finite
        return slope, finite & (used > 0)

    @override
    def quantities(self, tensors: Constrained) -> dict[str, Tensor]:
        """What the radii tell; with ``when="fit_end"`` the distance until then, and no shares of steps."""
        return super().quantities(tensors) if self._to_come else self.radii.quantities(not self.acts_at_end)

    @override
    def growth(self) -> float:
        """Adam's step is at most about its learning rate."""
        return self.radii.growth * self.radius_steps / self.every_n_steps

    @override
    def state(self) -> dict[str, Any]:
        held_out = {} if self.held_out is None else self.held_out.state_dict()
        return {**self.radii.method_state(), "steps": dict(self.steps), "held_out": held_out}

    @override
    def load(self, state: dict[str, Any]) -> None:
        self.radii.load_method_state(state)
        self.steps = dict(state["steps"])
        if self.held_out is not None:
            self.held_out.load_state_dict(state["held_out"])

    @override
    def place(self, tensors: Constrained) -> None:
        super().place(tensors)
        self.skipped = self.skipped.to(tensors.scalar().device)
        self._to_come = self.acts_at_end

    @override
    def release(self) -> None:
        if self.held_out is not None:
            self.held_out.close()
        super().release()
        self.skipped, self._to_come = self.skipped.cpu(), False
        self.heldout_loss = None if self.heldout_loss is None else self.heldout_loss.cpu()
