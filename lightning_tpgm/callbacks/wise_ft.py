"""WiSE-FT: interpolation between the pretrained and the fine-tuned weights, in a Lightning `Trainer`."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.shared import Shared
from lightning_tpgm.methods import WiSEFT


class WiSEFTCallback(MethodCallback):
    """Replaces the weights at the end of the fit by W0 + alpha (W - W0), one alpha for all tensors.

    Floating-point buffers (the running statistics of BatchNorm) are interpolated with the same alpha, integer buffers
    keep their fine-tuned value. alpha = 0 gives the pretrained, alpha = 1 the fine-tuned tensors, to the bit.
    Parameters without a pretrained value (a new head) keep their fine-tuned one. Checkpoints that were written during
    the fit hold the fine-tuned weights; ``trainer.save_checkpoint`` after it saves the interpolated ones.

    Args:
        alpha: In [0, 1]. None: the fit changes nothing; afterwards `wise_ft_sweep` with `WiSEFTCallback.anchor` chooses
            alpha by a validation metric.
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: For an argument out of its range; when the fit starts, with nothing to interpolate.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.

    >>> WiSEFTCallback(alpha=0.5)
    WiSEFTCallback(alpha=0.5, exclude=())
    """

    _METHOD = WiSEFT
    _KEY = "wise_ft"

    def __init__(self, alpha: float | None = 0.5, **shared: Unpack[Shared]) -> None:
        self.alpha = alpha
        super().__init__(**shared)
