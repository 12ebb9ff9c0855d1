"""Decoupled L2-SP: AdamW's weight decay, towards the pretrained weights instead of zero."""

from __future__ import annotations

import torch
from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.method import Method, Step, check, is_number


class AnchorDecay(Method):
    """After every step W := W0 + (1 - lr * strength) (W - W0), with the learning rate lr that the step used.

    Unlike the penalty of `L2SP` the decay does not pass through the optimizer: neither its momentum nor Adam's second
    moment changes it. A tensor without gradient is left alone.

    Args:
        strength: lambda, as the ``weight_decay`` of ``torch.optim.AdamW``.

    Raises:
        ValueError: For an argument out of its range.

    Source: the decay of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, towards
    the starting point of Li et al., ICML 2018.
    """

    def __init__(self, strength: float = 1e-2) -> None:
        check(is_number(strength) and strength >= 0, "strength", "a number that is not negative", strength)
        self.strength = strength

    @override
    def after(self, tensors: Constrained, step: Step) -> None:
        """Decays; a learning rate times strength above 1 stops at the anchor."""
        kept = (1 - tensors.learning_rates(step.optimizer) * self.strength).clamp(0, 1)
        kept = torch.where(step.moved(tensors), kept, 1)
        moved = [parameter.requires_grad and parameter.grad is not None for parameter in tensors.parameters]
        tensors.shrink(tensors.weights(), kept, moved)
