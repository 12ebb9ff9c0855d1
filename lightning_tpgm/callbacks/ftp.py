"""FTP: Fast Trainable Projection, in a Lightning `Trainer`."""

from __future__ import annotations

from typing_extensions import Unpack

from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.radii import WithRadii
from lightning_tpgm.callbacks.shared import Shared
from lightning_tpgm.methods import FTP
from lightning_tpgm.methods.radii import RadiusLr
from lightning_tpgm.norms import Norm


class FTPCallback(WithRadii, MethodCallback):
    """Learns radii as TPGM does, from the next training gradient: no held-out data, no extra forward or backward.

    The first step snaps back to the anchor. From then on each gradient says how the step before it should have been
    projected. `lightning_tpgm.methods.FTP` has the rule. Beside the anchor the callback keeps the unprojected deviation
    of the last step. A tensor that an optimizer step leaves out (it belongs to another optimizer, or has no gradient)
    is left out here too.

    Args:
        k: Factor in [0, 1] on gradients that would shrink a radius. 1 is the strongest constraint. At 0 radii never
            shrink by gradient.
        radius_lr: As in `TPGMCallback`.
        norm: ``"mars"`` or ``"l2"``, as in `TPGMCallback`.
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: For an argument out of its range. When the fit starts, with nothing left to constrain
            or with a fused optimizer under a gradient scaler (``precision="16-mixed"``).

    Source: Tian et al., "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023, arXiv 2310.19182.

    >>> from lightning.pytorch import Trainer
    >>> callback = FTPCallback(k=0.5, exclude=["head.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    FTPCallback(k=0.5, radius_lr='auto', norm='mars', exclude=('head.*',))
    """

    _METHOD = FTP
    _KEY = "ftp"

    def __init__(
        self,
        k: float = 1.0,
        radius_lr: RadiusLr = "auto",
        norm: Norm = "mars",
        **shared: Unpack[Shared],
    ) -> None:
        self.k, self.radius_lr, self.norm = k, radius_lr, norm
        super().__init__(**shared)
