"""L2-SP: an L2 penalty on the distance from the starting point."""

from __future__ import annotations

from typing_extensions import override

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.method import Method, Step, check, is_number


class L2SP(Method):
    """Adds ``strength * (W - W0)`` to every gradient.

    That is the gradient of the penalty ``strength / 2 * ||W - W0||^2``. A tensor that is frozen, or has no
    gradient, is left alone.

    Args:
        strength: lambda, the weight of the penalty.

    Raises:
        ValueError: For an argument out of its range.

    Source: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018.
    """

    reads_gradients = True
    changes_gradients = True

    def __init__(self, strength: float = 1e-2) -> None:
        check(is_number(strength) and strength >= 0, "strength", "a number that is not negative", strength)
        self.strength = strength

    @override
    def change_gradients(self, tensors: Constrained, step: Step) -> None:
        """g := g + lambda (W - W0)."""
        strengths = tensors.scalar(self.strength).expand(len(tensors.names))
        found = zip(tensors.gradients(), tensors.parameters, strict=True)
        gradients = [gradient if parameter.requires_grad else None for gradient, parameter in found]
        tensors.add_deviations(gradients, tensors.weights(), strengths)
