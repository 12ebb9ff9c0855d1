"""L2-SP: an L2 penalty on the distance from the starting point, in a Lightning `Trainer`."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.shared import Shared
from lightning_tpgm.methods import L2SP


class L2SPCallback(MethodCallback):
    """Pulls the weights towards their pretrained values: adds ``strength * (W - W0)`` to every constrained gradient.

    That is the gradient of the penalty ``strength / 2 * ||W - W0||^2``. It is added before gradients are clipped. A
    parameter that has no gradient in a step, or belongs to an optimizer that is not stepping, is left alone.

    Args:
        strength: lambda, the weight of the penalty.
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: For an argument out of its range. When the fit starts, with nothing left to constrain
            or with a fused optimizer under a gradient scaler (``precision="16-mixed"``). When an optimizer steps
            outside of Lightning's hooks.

    Source: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018.

    >>> from lightning.pytorch import Trainer
    >>> callback = L2SPCallback(strength=0.1, exclude=["head.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    L2SPCallback(strength=0.1, exclude=('head.*',))
    """

    _METHOD = L2SP
    _KEY = "l2sp"

    def __init__(self, strength: float = 1e-2, **shared: Unpack[Shared]) -> None:
        self.strength = strength
        super().__init__(**shared)
