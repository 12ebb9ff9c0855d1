"""Decoupled L2-SP in a Lightning `Trainer`."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.shared import Shared
from lightning_tpgm.methods import AnchorDecay


class AnchorDecayCallback(MethodCallback):
    """AdamW's weight decay, towards the pretrained weights: decoupled L2-SP.

    After every step W := W0 + (1 - lr * strength) (W - W0), with the optimizer's own learning rate. Set the optimizer's
    ``weight_decay`` to 0: it would pull towards zero beside it.

    Args:
        strength: lambda, as the ``weight_decay`` of ``torch.optim.AdamW``.
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: For an argument out of its range; when the fit starts, with nothing to constrain.

    Source: see `lightning_tpgm.methods.AnchorDecay`.

    >>> from lightning.pytorch import Trainer
    >>> callback = AnchorDecayCallback(strength=0.1, exclude=["head.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    AnchorDecayCallback(strength=0.1, exclude=('head.*',))
    """

    _METHOD = AnchorDecay
    _KEY = "anchor_decay"

    def __init__(self, strength: float = 1e-2, **shared: Unpack[Shared]) -> None:
        self.strength = strength
        super().__init__(**shared)
