"""SPD: Selective Projection Decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained
from lightning_tpgm.callbacks.base import AnchoredCallback, check, is_number
from lightning_tpgm.callbacks.observed import Log
from lightning_tpgm.framework import pl
from lightning_tpgm.layout import Matrices
from lightning_tpgm.sharding import reshard


class SPDCallback(AnchoredCallback):
    """Decays a tensor towards its pretrained value, only in steps whose gradient itself points back there.

    With D the deviation from the anchor before (prev) and after (new) the optimizer's step and g the gradient that the
    step used, per tensor, in the Frobenius norm::

        if <g, D_prev> > 0:   W := W_new - strength * rho * D_new
                              rho = clip((||D_new|| - ||D_prev||) / ||D_new||, 0, 1)

    Beside the anchor the callback keeps the weights before the step while a step runs.

    Args:
        strength: lambda; 1 takes back the whole growth of the distance.
        exclude: fnmatch patterns over parameter names; those are not constrained.
        pretrained: Where the anchors come from, as in `TPGMCallback`; None: the weights at the start of the fit.
        log: What goes to the trainer's loggers: ``"summary"``, ``"all"`` (also each tensor's values) or ``"none"``, as
            in `TPGMCallback`.
        summary: Whether the fit ends with a printed table, as in `TPGMCallback`.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, as in `TPGMCallback`.

    Raises:
        MisconfigurationException: For an argument out of its range; when the fit starts, with nothing left to constrain
            or with a fused optimizer under a gradient scaler (``precision="16-mixed"``).

    Source: Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024,
    arXiv 2411.01713.

    >>> SPDCallback(exclude=["head.*"])
    SPDCallback(strength=1.0, exclude=('head.*',))
    """

    _KEY = "spd"
    _SHOWN = ("strength", "exclude")

    def __init__(
        self,
        strength: float = 1.0,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
    ) -> None:
        check(is_number(strength) and strength >= 0, "strength", "a number that is not negative", strength)
        super().__init__(exclude, pretrained, log, summary, anchor_device)
        self.strength = strength
        self._before: Matrices = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also refuses optimizers whose gradients cannot be read."""
        super().on_train_start(trainer, pl_module)
        self._check_gradients_can_be_read(trainer)

    @override
    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keeps the weights."""
        self._before = self._layout.copy(self._weights)

    @override
    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Decays the tensors whose gradient asks for it."""
        before, self._before = self._before, []
        layout, anchors = self._layout, self._anchors
        weights = layout.arrange(self._weights)
        grads = self._gradients(optimizer)
        consistency = self._sharding.total(layout.total(layout.dots(layout.arrange(grads), before, anchors)))
        old, new = self._distances(before), self._distances(weights)
        rho = torch.where(new > 0, (new - old) / new, 0).clamp(0, 1)
        decay = torch.where(consistency > 0, self.strength * rho, 0)
        reshard(pl_module)
        # to write where nothing decays would invalidate graphs that are still in use
        targets = [None if grad is None else weight for grad, weight in zip(grads, self._weights, strict=True)]
        layout.project(targets, weights, anchors, layout.of_rows(1 - decay))

    def _distances(self, weights: Matrices) -> Tensor:
        """The distance of each tensor, shape (T,)."""
        return self._layout.total(self._sharding.distances(self._layout.distances(weights, self._anchors)))
