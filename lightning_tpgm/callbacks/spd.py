"""SPD: Selective Projection Decay, in a Lightning `Trainer`."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.shared import Shared
from lightning_tpgm.methods import SPD


class SPDCallback(MethodCallback):
    """Decays a tensor towards its pretrained value, only in steps whose gradient itself points back there.

    `lightning_tpgm.methods.SPD` has the rule. Beside the anchor the callback keeps the weights before the step while a
    step runs.

    Args:
        strength: lambda; 1 takes back the whole growth of the distance.
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: For an argument out of its range. When the fit starts, with nothing left to constrain
            or with a fused optimizer under a gradient scaler (``precision="16-mixed"``).

    Source: Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", NeurIPS 2024,
    arXiv 2411.01713.

    >>> from lightning.pytorch import Trainer
    >>> callback = SPDCallback(exclude=["head.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    SPDCallback(strength=1.0, exclude=('head.*',))
    """

    _METHOD = SPD
    _KEY = "spd"

    def __init__(self, strength: float = 1.0, **shared: Unpack[Shared]) -> None:
        self.strength = strength
        super().__init__(**shared)
