"""DiGraP: Directional Gradient Projection."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.last_step import LastStep
from lightning_tpgm.methods.learned import LearnedScalars
from lightning_tpgm.methods.method import Method, Step, check, is_number


class Omegas(LearnedScalars):
    """omega of all tensors, and the learning rate of each one's last step; 0 where that had no conflict."""

    _MORE = ("lr_used",)

    lr_used: Tensor


class DiGraP(Method):
    """Takes out of each gradient a learned share of what would move the tensor further from its pretrained value.

    Per tensor, with g the gradient that the optimizer is about to use and D = W - W0::

        g_proj = <g, D> / ||D||^2 D
        if <g, D> < 0 (a step along -g increases the distance):   g := g - omega g_proj

    omega in [0, 1] starts at 0 and is learned by Adam. For a step W_t = W_(t-1) - lr (g_(t-1) - omega g_proj_(t-1)),
    the chain rule gives::

        dLoss(W_t) / domega_(t-1) = <g_t, dW_t / domega_(t-1)> = + lr <g_t, g_proj_(t-1)>

    Where there was no conflict g_proj_(t-1) is replaced by 0, because W_t does not depend on omega then. So omega
    grows where the loss would have been lower, had the step gone out less far. As in the paper the inner product is
    divided by ||g_t|| ||g_proj_(t-1)||.

    Args:
        omega_lr: mu, the Adam learning rate of omega.

    Raises:
        ValueError: For an argument out of its range.

    Source: Huang et al., "Directional Gradient Projection for Robust Fine-Tuning of Foundation Models", ICLR 2025,
    arXiv 2502.15895, algorithm 1.
    """

    reads_gradients = True
    changes_gradients = True

    def __init__(self, omega_lr: float = 1e-2) -> None:
        check(is_number(omega_lr) and omega_lr > 0, "omega_lr", "a positive number", omega_lr)
        self.omegas = Omegas(omega_lr)
        self.unstepped = LastStep()  # D before each tensor's last step
        # what a step that is about to happen will leave, of these tensors
        self._next, self._newer, self._stepping = self.omegas, LastStep(), list[str]()

    @override
    def joined(self, tensors: Constrained, names: Sequence[str]) -> None:
        for omegas in {self.omegas, self._next}:  # a step may be about to happen
            omegas.add(names)
            omegas.start(torch.zeros_like(omegas.value))

    @override
    def change_gradients(self, tensors: Constrained, step: Step) -> None:
        """Updates omega, then g := g - omega g_proj where there is a conflict."""
        grads, weights = tensors.gradients(), tensors.weights()
        before, present = self.unstepped.of(tensors), [grad is not None for grad in grads]
        stepping, known = tensors.which(present), self.unstepped.known(tensors)
        kept = self._newer.memory(tensors, present)
        sums = tensors.step_sums(weights, before, grads, kept, more=True)
        dots, squared, old_squared, inner, size_squared = tensors.total(sums)
        self._next = copy(self.omegas)
        with self._next.of(tensors) as omegas:
            # <g_t, g_proj_(t-1)> normalised: on conflict g_proj is a negative multiple of D
            norms = size_squared.sqrt() * old_squared.sqrt()
            slope = torch.where(norms > 0, -omegas.lr_used * dots / norms, 0)
            omegas.adam(slope, where=stepping & known & slope.isfinite())
            omegas.value = omegas.value.clamp(0, 1)

            conflict = (inner < 0) & inner.isfinite()
            shares = torch.where(conflict, omegas.value * inner / squared, 0)
            lr = torch.where(conflict, tensors.learning_rates(step.optimizer), 0)
            omegas.lr_used = torch.where(stepping, lr, omegas.lr_used)
        self._stepping = [name for name, here in zip(tensors.names, present, strict=True) if here]
        changes = tensors.may_be_some(shares)
        changed = [grad if here else None for grad, here in zip(grads, changes, strict=True)]
        tensors.add_multiples(changed, self._newer.of(tensors), -shares)

    @override
    def after(self, tensors: Constrained, step: Step) -> None:
        """Keeps what `change_gradients` found: only now is it sure that a gradient scaler has not skipped the step."""
        self.omegas = self._next
        self.unstepped.swap(self._newer, self._stepping)

    @override
    def quantities(self, tensors: Constrained) -> dict[str, Tensor]:
        """The distance, and omega."""
        return {**super().quantities(tensors), "omega": self.omegas.value}

    @override
    def state(self) -> dict[str, Any]:
        """omega, its Adam state, and the last step."""
        return {
            "omegas": self.omegas.state_dict(),
            "lr": self.omegas.lr_used.cpu(),
            "unstepped": self.unstepped.state(),
        }

    @override
    def load(self, state: dict[str, Any]) -> None:
        self.omegas.load_state_dict(state["omegas"])
        self.omegas.lr_used = state["lr"]
        # older checkpoints have the weights themselves: the next step learns nothing
        self.unstepped.load({} if "previous" in state else state["unstepped"])
        self._forget_next()

    @override
    def release(self) -> None:
        super().release()
        self._forget_next()

    def _forget_next(self) -> None:
        self._next, self._newer, self._stepping = self.omegas, LastStep(), []
