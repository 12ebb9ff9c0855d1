"""L2-SP: an L2 penalty on the distance from the starting point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained
from lightning_tpgm.callbacks.base import check, is_number
from lightning_tpgm.callbacks.gradient import GradientCallback
from lightning_tpgm.callbacks.observed import Log


class L2SPCallback(GradientCallback):
    """Pulls the weights towards their pretrained values: adds ``strength * (W - W0)`` to every constrained gradient.

    That is the gradient of the penalty ``strength / 2 * ||W - W0||^2``. It is added before gradients are clipped. A
    parameter that has no gradient in a step, or belongs to an optimizer that is not stepping, is left alone.

    Args:
        strength: lambda, the weight of the penalty.
        exclude: fnmatch patterns over parameter names; those are not constrained.
        pretrained: Where the anchors come from, as in `TPGMCallback`; None: the weights at the start of the fit.
        log: What goes to the trainer's loggers: ``"summary"``, ``"all"`` (also each tensor's values) or ``"none"``, as
            in `TPGMCallback`.
        summary: Whether the fit ends with a printed table, as in `TPGMCallback`.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, as in `TPGMCallback`.

    Raises:
        MisconfigurationException: For an argument out of its range; when the fit starts, with nothing left to constrain
            or with a fused optimizer under a gradient scaler (``precision="16-mixed"``); when an optimizer steps
            outside of Lightning's hooks.

    Source: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018.

    >>> L2SPCallback(strength=0.1, exclude=["head.*"])
    L2SPCallback(strength=0.1, exclude=('head.*',))
    """

    _KEY = "l2sp"
    _SHOWN = ("strength", "exclude")

    def __init__(
        self,
        strength: float = 1e-2,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
    ) -> None:
        check(is_number(strength) and strength >= 0, "strength", "a number that is not negative", strength)
        super().__init__(exclude, pretrained, log, summary, anchor_device)
        self.strength = strength

    @override
    def change_gradients(self, optimizer: Optimizer) -> None:
        """g := g + lambda (W - W0)."""
        layout = self._layout
        strengths = layout.of_rows(torch.full_like(layout.scalar(), self.strength).expand(len(self._parameters)))
        layout.add_deviations(self._gradients(optimizer), layout.arrange(self._weights), self._anchors, strengths)
