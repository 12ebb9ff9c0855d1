"""DiGraP: Directional Gradient Projection."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained, capture
from lightning_tpgm.callbacks.base import check, is_number, to_cpu
from lightning_tpgm.callbacks.gradient import GradientCallback
from lightning_tpgm.callbacks.observed import Log
from lightning_tpgm.framework import pl
from lightning_tpgm.layout import Matrices
from lightning_tpgm.radii import LearnedScalars
from lightning_tpgm.sharding import full, local


class DiGraPCallback(GradientCallback):
    """Takes out of each gradient a learned share of what would move the tensor further from its pretrained value.

    Per tensor, with g the gradient that the optimizer is about to use and D = W - W0::

        g_proj = <g, D> / ||D||^2 D
        if <g, D> < 0 (a step along -g increases the distance):   g := g - omega g_proj

    omega in [0, 1] starts at 0 and is learned by Adam. For a step W_t = W_(t-1) - lr (g_(t-1) - omega g_proj_(t-1)),
    the chain rule gives::

        dLoss(W_t) / domega_(t-1) = <g_t, dW_t / domega_(t-1)> = + lr <g_t, g_proj_(t-1)>

    with g_proj_(t-1) replaced by 0 where there was no conflict, because W_t does not depend on omega then. omega grows
    where the loss would have been lower, had the step gone out less far. As in the paper the inner product is
    normalised: divided by ||g_t|| ||g_proj_(t-1)||. Beside the anchor the callback keeps the weights of the last step.

    Args:
        omega_lr: mu, the Adam learning rate of omega.
        exclude: fnmatch patterns over parameter names; those are not constrained.
        pretrained: Where the anchors come from, as in `TPGMCallback`; None: the weights at the start of the fit.
        log: What goes to the trainer's loggers: ``"summary"``, ``"all"`` (also each tensor's values) or ``"none"``, as
            in `TPGMCallback`.
        summary: Whether the fit ends with a printed table, as in `TPGMCallback`.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, as in `TPGMCallback`.

    Raises:
        MisconfigurationException: As `L2SPCallback`.

    Source: Huang et al., "Directional Gradient Projection for Robust Fine-Tuning of Foundation Models", ICLR 2025,
    arXiv 2502.15895, algorithm 1.

    >>> DiGraPCallback(exclude=["head.*"])
    DiGraPCallback(omega_lr=0.01, exclude=('head.*',))
    """

    _KEY = "digrap"
    _SHOWN = ("omega_lr", "exclude")
    _previous: dict[str, Tensor]
    _next: tuple[LearnedScalars, Tensor, dict[str, Tensor]]  # what a step that is about to happen will leave

    def __init__(
        self,
        omega_lr: float = 1e-2,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
    ) -> None:
        check(is_number(omega_lr) and omega_lr > 0, "omega_lr", "a positive number", omega_lr)
        super().__init__(exclude, pretrained, log, summary, anchor_device)
        self.omega_lr = omega_lr
        self.reset_method()

    @property
    def omegas(self) -> dict[str, float]:
        """omega of each constrained parameter, by name; empty before the first fit."""
        return self._omegas.as_dict()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also takes the last step of an earlier fit back to the device."""
        super().on_train_start(trainer, pl_module)
        self._place_previous(self._previous)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Also lets go of the last step's device memory."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._previous = to_cpu(self._previous)

    @override
    def quantities(self) -> dict[str, Tensor]:
        """Also omega."""
        found = super().quantities()
        return {**found, "omega": self._omegas.value} if found else {}

    @override
    def reset_method(self) -> None:
        """Forgets omega and the last step."""
        self._omegas = LearnedScalars(self.omega_lr)
        self._lr = torch.empty(0)  # of the last step; 0 where it had no conflict: omega had no effect
        self._previous = {}  # the weights before the last step of each tensor

    @override
    def joined(self, names: list[str]) -> None:
        """Gives each new parameter an omega of 0."""
        self._place()
        self._omegas.add(names)
        self._omegas.start(torch.zeros_like(self._omegas.value))
        self._lr = torch.cat([self._lr, self._lr.new_zeros(len(names))])

    def _place(self) -> None:
        self._omegas.to(self._layout.scalar())
        self._lr = self._lr.to(self._omegas.value)

    @override
    def method_state(self) -> dict[str, Any]:
        """omega, its Adam state, and the last step."""
        previous = {name: full(weight).cpu() for name, weight in self._previous.items()}
        return {"omegas": self._omegas.state_dict(), "lr": self._lr.cpu(), "previous": previous}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        """Takes over what `method_state` gave."""
        self._omegas.load_state_dict(state["omegas"])
        self._lr = state["lr"]
        self._place()
        self._place_previous(state["previous"])

    def _place_previous(self, previous: dict[str, Tensor]) -> None:
        self._previous = {name: capture(value, self._parameters[name]) for name, value in previous.items()}

    @override
    def change_gradients(self, optimizer: Optimizer) -> None:
        """Updates omega, then g := g - omega g_proj where there is a conflict."""
        omegas, layout, anchors = copy(self._omegas), self._layout, self._anchors
        grads = self._gradients(optimizer)
        gradients, weights = layout.arrange(grads), layout.arrange(self._weights)
        stepping = layout.on_device([grad is not None for grad in grads])
        lrs = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}

        def dots(weights: Matrices) -> Tensor:
            """<g, D> of each tensor."""
            return self._sharding.total(layout.total(layout.dots(gradients, weights, anchors)))

        def whole(norms: Tensor) -> Tensor:
            """The norm of each tensor from those of this process's parts."""
            return layout.total(self._sharding.distances(norms))

        # <g_t, g_proj_(t-1)> normalised: on conflict g_proj is a negative multiple of D
        previous = layout.arrange([local(self._previous.get(name, now)) for name, now in self._parameters.items()])
        norms = whole(layout.norms(gradients)) * whole(layout.distances(previous, anchors))
        slope = torch.where(norms > 0, -self._lr * dots(previous) / norms, 0)
        known = layout.on_device([name in self._previous for name in self._parameters])
        omegas.adam(slope, where=stepping & known & slope.isfinite())
        omegas.value = omegas.value.clamp(0, 1)

        inner, squared = dots(weights), whole(layout.distances(weights, anchors)).square()
        conflict = (inner < 0) & inner.isfinite()
        shares = torch.where(conflict, omegas.value * inner / squared, 0)
        lr = layout.on_device([lrs.get(id(p), 0.0) for p in self._parameters.values()], layout.dtype)
        lr = torch.where(stepping, torch.where(conflict, lr, 0), self._lr)
        stepped = {
            name: capture(parameter, parameter)
            for (name, parameter), grad in zip(self._parameters.items(), grads, strict=True)
            if grad is not None
        }
        layout.add_deviations(grads, weights, anchors, layout.of_rows(-shares))
        self._next = omegas, lr, {**self._previous, **stepped}

    @override
    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Keeps what `change_gradients` found: only now is it sure that a gradient scaler has not skipped the step."""
        super().after_optimizer_step(trainer, pl_module, optimizer)
        self._omegas, self._lr, self._previous = self._next
