"""SPD: Selective Projection Decay."""

from __future__ import annotations

import torch
from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Matrices
from lightning_tpgm.methods.method import Method, Step, check, is_number


class SPD(Method):
    """Decays a tensor towards its pretrained value, only in steps whose gradient itself points back there.

    D is the deviation from the anchor before (prev) and after (new) the optimizer's step. g is the gradient that the
    step used. Per tensor, in the Frobenius norm::

        if <g, D_prev> > 0:   W := W_new - strength * rho * D_new
                              rho = clip((||D_new|| - ||D_prev||) / ||D_new||, 0, 1)

    Args:
        strength: lambda; 1 takes back the whole growth of the distance.

    Raises:
        ValueError: For an argument out of its range.

    Source: Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024,
    arXiv 2411.01713.
    """

    reads_gradients = True

    def __init__(self, strength: float = 1.0) -> None:
        check(is_number(strength) and strength >= 0, "strength", "a number that is not negative", strength)
        self.strength = strength
        self._before: Matrices = []

    @override
    def before(self, tensors: Constrained, step: Step) -> None:
        """Keeps the weights."""
        self._before = []  # first: a step may begin again with other tensors, as the first one of a fit does
        self._before = tensors.keep()

    @override
    def after(self, tensors: Constrained, step: Step) -> None:
        """Decays the tensors whose gradient asks for it."""
        before, self._before = self._before, []
        grads, weights = tensors.gradients(), tensors.weights()
        consistency, *squares = tensors.total(tensors.change_sums(weights, before, grads))
        new, old = (square.sqrt() for square in squares)
        rho = torch.where(new > 0, (new - old) / new, 0).clamp(0, 1)
        decay = torch.where(consistency > 0, self.strength * rho, 0)
        # to write where nothing decays takes time, and invalidates graphs that are still in use
        decays = tensors.may_be_some(decay)
        moved = [grad is not None and here for grad, here in zip(grads, decays, strict=True)]
        tensors.shrink(weights, 1 - decay, moved)

    @override
    def release(self) -> None:
        self._before = []
