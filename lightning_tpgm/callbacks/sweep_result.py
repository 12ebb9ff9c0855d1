"""What a sweep over alphas has measured, and which alpha that chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning_tpgm.callbacks.framework import rank_zero_warn
from lightning_tpgm.observing.alphas import plot_alphas

ROUNDING = 1e-6  # of metrics, relative: they come in 32 bits, and 0.92 - 0.9 is more than 0.02 there
Mode = Literal["max", "min"]


@dataclass(frozen=True)
class WiSEFTSweep:
    """What `wise_ft_sweep` measured.

    Attributes:
        monitor: Name of the metric.
        mode: ``"max"`` or ``"min"``: which values are better.
        alphas: The alphas tried, in order.
        values: The metric at each of them.
        tolerance: How much worse than the best the metric may be at the chosen alpha, in the metric's unit.
    """

    monitor: str
    mode: Mode
    alphas: tuple[float, ...]
    values: tuple[float, ...]
    tolerance: float = 0.0

    @property
    def best_alpha(self) -> float:
        """The alpha with the best value; among equals the smallest, nearest to the pretrained weights.

        A value that is not a number is worse than any other. Where none is finite: 1, the fine-tuned end.
        """
        return self._best[0]

    @property
    def chosen_alpha(self) -> float:
        """The smallest alpha whose value is within the tolerance of the best; without a tolerance `best_alpha`.

        Values in between may be worse: each alpha is a model of its own, and was measured.
        """
        best_alpha, best = self._best
        slack = ROUNDING * abs(best) if self.tolerance else 0.0
        worst = self._sign * best - self.tolerance - slack
        within = [a for a, value in zip(self.alphas, self.values, strict=True) if self._sign * value >= worst]
        return min(within, default=best_alpha)

    @property
    def _sign(self) -> int:
        return 1 if self.mode == "max" else -1

    @property
    def _best(self) -> tuple[float, float]:
        def rank(pair: tuple[float, float]) -> tuple[bool, float, float]:
            alpha, value = pair
            return (False, 0.0, -alpha) if math.isnan(value) else (True, self._sign * value, -alpha)

        if not any(map(math.isfinite, self.values)):
            return 1.0, math.nan
        return max(zip(self.alphas, self.values, strict=True), key=rank)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the metric over alpha, the best and the chosen alpha, and the band within the tolerance.

        Args:
            ax: Matplotlib axes to draw into. None: a new figure.

        Returns:
            The matplotlib figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        values = dict(zip(self.alphas, self.values, strict=True))
        return plot_alphas(values, self.monitor, self.best_alpha, self.chosen_alpha, self.tolerance, self._sign, ax)


def warn_of_no_choice(sweep: WiSEFTSweep) -> None:
    """Warn of a metric that says nothing about alpha."""
    if not any(map(math.isfinite, sweep.values)):
        rank_zero_warn(
            f"{sweep.monitor!r} is finite at none of {len(sweep.alphas)} alphas. The fine-tuned weights stay, alpha ="
            " 1. Give `monitor` a metric that is finite, or mend what makes this one infinite or not a number."
        )
    elif len(set(sweep.alphas)) > 1 and len(set(sweep.values)) == 1:
        rank_zero_warn(
            f"{sweep.monitor!r} is {sweep.values[0]:g} at each of {len(sweep.alphas)} alphas. The smallest was chosen,"
            f" alpha = {sweep.chosen_alpha:g}. Does validation evaluate other weights than those of the module, an"
            " average for instance? Then let it evaluate the module's. Or give `monitor` a finer metric."
        )
