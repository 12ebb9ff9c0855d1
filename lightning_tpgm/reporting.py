"""What a method did to the constrained tensors, in few numbers.

Quantities are vectors of shape (T,) for T constrained tensors: the ``distance`` of each from its anchor, its
``radius``, the ``ratio`` that the projection left of the deviation of its farthest row (1: inside the ball), whether
the constraint ``binds``, and ``omega`` (DiGraP).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PER_TENSOR = ("radius", "distance", "omega")
"""The quantities that are logged and kept for each tensor."""


def in_short(quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars that summarise the quantities, on their device.

    ``distance`` is the root of the sum of squares over the tensors: in the norm l2 the distance of all weights at once.

    >>> in_short({"distance": torch.tensor([3.0, 4.0]), "ratio": torch.tensor([0.5, 1.0]),
    ...     "binds": torch.tensor([True, False])})
    {'distance': tensor(5.), 'mean_ratio': tensor(0.7500), 'min_ratio': tensor(0.5000), 'binding': tensor(0.5000)}
    """
    found = {"distance": torch.linalg.vector_norm(quantities["distance"])}
    if "ratio" in quantities:
        ratio, binds = quantities["ratio"], quantities["binds"]
        found |= {"mean_ratio": ratio.mean(), "min_ratio": ratio.min(), "binding": binds.to(ratio).mean()}
    if "omega" in quantities:
        found["mean_omega"] = quantities["omega"].mean()
    return found


def by_name(prefix: str, names: Iterable[str], values: Tensor) -> dict[str, float]:
    """The values that are numbers, by prefixed name; waits for the device.

    >>> by_name("tpgm_radius/", ["a", "b"], torch.tensor([0.5, torch.nan]))
    {'tpgm_radius/a': 0.5}
    """
    pairs = zip(names, values.tolist(), strict=True)
    return {f"{prefix}{name}": value for name, value in pairs if value == value}
