"""How far a metric may be off by chance: its standard error, from what a validation logged in its batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-3  # of hits, counted in 32 bits: a share of up to 10^4 examples times their number


def standard_error(value: float, batches: Sequence[tuple[float, int]]) -> float | None:
    """The standard error of a metric that is a mean over examples; None if it is none, or it cannot be had.

    With B batches of n_b examples, N in all, and the mean v_b in each, the metric is m = sum of n_b v_b / N. The
    variance of an example's value is s^2 = sum of n_b (v_b - m)^2 / (B - 1), that of m is s^2 / N. Where every n_b v_b
    is a whole number, hits are counted: s^2 = m (1 - m) needs no scatter between batches.

    Args:
        value: The metric.
        batches: Its value in each batch, and the number of examples there.

    >>> standard_error(0.75, [(1.0, 2), (0.5, 2)])
    0.21650635094610965
    >>> standard_error(0.3, [(0.2, 2), (0.4, 2)])
    0.1
    >>> standard_error(0.9, [(0.2, 2), (0.4, 2)])  # not the mean: AUROC, F1, the worst batch
    """
    if not math.isfinite(value):
        return math.nan
    examples = sum(size for _, size in batches)
    mean = math.fsum(v * n for v, n in batches) / max(examples, 1)
    if not math.isclose(mean, value, rel_tol=1e-4, abs_tol=1e-7):
        return None
    if all(0 <= v <= 1 and abs(v * n - round(v * n)) < ROUNDING for v, n in batches):
        return math.sqrt(max(mean * (1 - mean), 0.0) / examples)
    if len(batches) < 2:
        return None
    return math.sqrt(math.fsum(n * (v - mean) ** 2 for v, n in batches) / (len(batches) - 1) / examples)
