"""DiGraP: Directional Gradient Projection, in a Lightning `Trainer`."""

from __future__ import annotations

from typing import cast

from typing_extensions import Unpack

from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.shared import Shared
from lightning_tpgm.methods import DiGraP


class DiGraPCallback(MethodCallback):
    """Takes out of each gradient a learned share of what would move the tensor further from its pretrained value.

    `lightning_tpgm.methods.DiGraP` has the rule, and where the derivative of omega comes from. Beside the anchor the
    callback keeps the deviation at the last step.

    Args:
        omega_lr: mu, the Adam learning rate of omega.
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: As `L2SPCallback`.

    Source: Huang et al., "Directional Gradient Projection for Robust Fine-Tuning of Foundation Models", ICLR 2025,
    arXiv 2502.15895, algorithm 1.

    >>> from lightning.pytorch import Trainer
    >>> callback = DiGraPCallback(exclude=["head.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    DiGraPCallback(omega_lr=0.01, exclude=('head.*',))
    """

    _METHOD = DiGraP
    _KEY = "digrap"

    def __init__(self, omega_lr: float = 1e-2, **shared: Unpack[Shared]) -> None:
        self.omega_lr = omega_lr
        super().__init__(**shared)

    @property
    def omegas(self) -> dict[str, float]:
        """omega of each constrained parameter, by name; empty before the first fit."""
        return cast(DiGraP, self._constraint.method).omegas.as_dict()
