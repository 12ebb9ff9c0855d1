"""FTP: Fast Trainable Projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained, capture
from lightning_tpgm.callbacks.base import check, is_number, to_cpu
from lightning_tpgm.callbacks.observed import Log
from lightning_tpgm.callbacks.radius import RadiusCallback
from lightning_tpgm.framework import pl
from lightning_tpgm.norms import Norm
from lightning_tpgm.projection import EPS, MIN_RADIUS
from lightning_tpgm.sharding import full, local


class FTPCallback(RadiusCallback):
    """Learns radii as TPGM does, from the next training gradient: no held-out data, no extra forward or backward.

    After step t of whatever optimizer the module has, with g the gradient that the step used, c the deviation before
    the projection and n its row norms + 1e-8::

        t = 1:  gamma = 1e-8 (the first step snaps back to the anchor)
        t > 1:  dgamma = sum over rows of <g_t, c_(t-1)> / n_(t-1);  if dgamma > 0: dgamma *= k
                gamma  = clip(Adam(gamma, dgamma), 1e-8, max n_t)
        W := W0 + clip(gamma / n_t, 0, 1) c_t

    The derivative is that of the loss at the projected weights of step t - 1, which is where g_t is taken. Beside the
    anchor the callback keeps the unprojected weights of the last step. A tensor that an optimizer step leaves out (it
    belongs to another optimizer, or has no gradient) is left out here too.

    Args:
        k: Factor in [0, 1] on gradients that would shrink a radius; 1: strongest constraint, 0: radii never shrink by
            gradient.
        radius_lr: Adam learning rate of the radii.
        norm: ``"mars"`` or ``"l2"``, as in `TPGMCallback`.
        exclude: fnmatch patterns over parameter names; those are not constrained.
        pretrained: Where the anchors come from, as in `TPGMCallback`; None: the weights at the start of the fit.
        log: What goes to the trainer's loggers: ``"summary"``, ``"all"`` (also each tensor's values) or ``"none"``, as
            in `TPGMCallback`.
        summary: Whether the fit ends with a printed table, as in `TPGMCallback`.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, as in `TPGMCallback`.
        compile: Whether the tensor work is fused by ``torch.compile``, as in `TPGMCallback`.

    Raises:
        MisconfigurationException: For an argument out of its range; when the fit starts, with nothing left to constrain
            or with a fused optimizer under a gradient scaler (``precision="16-mixed"``).

    Source: Tian et al., "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023, arXiv 2310.19182.

    >>> FTPCallback(k=0.5, exclude=["head.*"])
    FTPCallback(k=0.5, radius_lr=0.01, norm='mars', exclude=('head.*',))
    """

    _KEY = "ftp"
    _SHOWN = ("k", "radius_lr", "norm", "exclude")
    _previous: dict[str, Tensor]

    def __init__(
        self,
        k: float = 1.0,
        radius_lr: float = 1e-2,
        norm: Norm = "mars",
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
        compile: bool = False,
    ) -> None:
        check(is_number(k) and 0 <= k <= 1, "k", "a number in [0, 1]", k)
        super().__init__(radius_lr, norm, exclude, pretrained, log, summary, anchor_device, compile)
        self.k = k

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also refuses optimizers whose gradients cannot be read."""
        super().on_train_start(trainer, pl_module)
        self._check_gradients_can_be_read(trainer)
        self._place_previous(self._previous)  # those of an earlier fit are on the CPU

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Also lets go of the last step's device memory."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._previous = to_cpu(self._previous)

    @override
    def reset_method(self) -> None:
        """Forgets the radii and the last step."""
        super().reset_method()
        self._previous = {}  # the unprojected weights after the last step of each tensor

    @override
    def method_state(self) -> dict[str, Any]:
        """Radii, their Adam state, and the unprojected weights of the last step."""
        return {**super().method_state(), "previous": {name: full(w).cpu() for name, w in self._previous.items()}}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        """Takes over what `method_state` gave."""
        super().load_method_state(state)
        self._place_previous(state["previous"])

    def _place_previous(self, previous: dict[str, Tensor]) -> None:
        self._previous = {name: capture(value, self._parameters[name]) for name, value in previous.items()}

    @override
    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Updates the radii from the gradient that the step used, and projects the weights."""
        layout, radii, grads = self._layout, self._radii, self._gradients(optimizer)
        weights = layout.arrange(self._weights)
        distances, largest = self._measure(weights)
        stepped = layout.on_device([grad is not None for grad in grads])
        known = layout.on_device([name in self._previous for name in self._parameters])

        slope = self._slopes(grads)
        radii.start(torch.full_like(radii.value, MIN_RADIUS))
        radii.adam(torch.where(slope > 0, self.k * slope, slope), where=stepped & known)
        # Adam counts the optimizer's steps: the next is t = 2
        radii.step = torch.where(stepped & ~known, 1, radii.step)
        radii.clamp(largest + EPS, where=stepped)

        self._remember([name for name, grad in zip(self._parameters, grads, strict=True) if grad is not None])
        self._project(pl_module, weights, distances, moved=[grad is not None for grad in grads])
        self._projected(largest, moved=stepped)

    def _remember(self, names: list[str]) -> None:
        """Keep the present weights, in the memory of those of the last step."""
        new = [name for name in names if name not in self._previous]
        self._previous |= {name: capture(self._parameters[name], self._parameters[name]) for name in new}
        known = [name for name in names if name not in new]
        if known:
            previous, present = ([local(of[name]) for name in known] for of in (self._previous, self._parameters))
            torch._foreach_copy_(previous, present)

    def _slopes(self, grads: list[Tensor | None]) -> Tensor:
        """dgamma of each tensor, shape (T,), 0 for those without gradient; meaningless without a previous step."""
        layout = self._layout
        previous = layout.arrange([local(self._previous.get(name, now)) for name, now in self._parameters.items()])
        distances = self._sharding.distances(layout.distances(previous, self._anchors))
        dots = layout.dots(layout.arrange(grads), previous, self._anchors)
        return self._sharding.total(layout.total(dots / (distances + EPS)))
