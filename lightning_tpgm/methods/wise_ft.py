"""WiSE-FT: interpolation between the pretrained and the fine-tuned weights."""

from __future__ import annotations

from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.method import Method, check, is_number


class WiSEFT(Method):
    """At the end W := W0 + alpha (W - W0), one alpha for all tensors, floating-point buffers included.

    Args:
        alpha: In [0, 1]; 0 gives the pretrained, 1 the fine-tuned tensors, to the bit. None: nothing happens.

    Raises:
        ValueError: For an argument out of its range.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.
    """

    constrains_buffers = True

    def __init__(self, alpha: float | None = 0.5) -> None:
        check(alpha is None or (is_number(alpha) and 0 <= alpha <= 1), "alpha", "a number in [0, 1] or None", alpha)
        self.alpha = alpha
        self.acts_at_end = alpha is not None

    @override
    def finish(self, tensors: Constrained) -> None:
        """Interpolates."""
        if self.alpha is not None and tensors.names:
            tensors.shrink(tensors.weights(), tensors.scalar(self.alpha).expand(len(tensors.names)))
