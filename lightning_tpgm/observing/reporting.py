"""What a method did to the constrained tensors, in few numbers.

Quantities are vectors of shape (T,) for T constrained tensors:

- ``distance``: of each from its anchor;
- ``omega`` (DiGraP);
- ``radius``;
- ``ratio``: what the last projection left of the deviation of the farthest row, 1 inside the ball;
- ``binds``: whether that was less than all;
- ``wanted``, ``allowed``: the distance before and after a projection, as a mean over the tensor's steps;
- ``bound``: in which share of its steps a projection changed it;
- ``pinned``: in which share it left nearly nothing, see `lightning_tpgm.methods.radii.Radii.HOLDS`.

After the fact there is one projection: its ``wanted`` and ``allowed``, and no shares of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tpgm.observing.names import blocks

PER_TENSOR = ("radius", "distance", "ratio", "bound", "omega")
"""The quantities that are kept for each tensor, over the steps."""
LOGGED = (*PER_TENSOR, "wanted", "allowed")
"""Those that are logged for each tensor, on request."""
PINNED = 0.8
"""A tensor that was held at its anchor in at least this share of its steps is called pinned."""
Row = dict[str, Any]


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
    if "bound" in quantities:
        found |= {"bound": quantities["bound"].nanmean(), "pinned": (quantities["pinned"] >= PINNED).float().mean()}
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


def rows_of(tensors: Mapping[str, Tensor], quantities: Mapping[str, Tensor]) -> list[Row]:
    """One dict per tensor: its name, its shape, and each quantity as a plain number or truth value.

    >>> rows_of({"head.bias": torch.zeros(2)}, {"distance": torch.tensor([0.5])})
    [{'name': 'head.bias', 'shape': (2,), 'distance': 0.5}]
    """
    columns = {name: vector.tolist() for name, vector in quantities.items()}
    named = enumerate(tensors.items())
    return [
        {"name": name, "shape": tuple(tensor.shape), **{column: columns[column][index] for column in columns}}
        for index, (name, tensor) in named
    ]


def left(quantities: Mapping[str, Tensor]) -> Tensor:
    """Which share of the distance that was wanted was allowed, shape (T,); 1 where nothing was wanted.

    >>> left({"wanted": torch.tensor([2.0, 0.0]), "allowed": torch.tensor([0.5, 0.0])})
    tensor([0.2500, 1.0000])
    """
    return torch.where(quantities["wanted"] > 0, quantities["allowed"] / quantities["wanted"], 1)


def by_block(
    names: Sequence[str], quantities: Mapping[str, Tensor], most: int
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The quantities of each block of tensors, where there are more than ``most``; see `names.blocks`.

    Distances are the root of the sum of squares over a block's tensors, the others their mean.

    Returns:
        How many tensors each block has, by its label, and the quantities, shape (blocks,) each.
    """
    found = blocks(names, most)
    each = [torch.tensor(indices) for indices in found.values()]
    quantities = {name: vector.to(torch.float32) for name, vector in quantities.items()}
    lengths = ("radius", "distance", "wanted", "allowed")
    of_blocks = {
        name: torch.stack(
            [vector[at].square().nansum(-1).sqrt() if name in lengths else vector[at].nanmean(-1) for at in each]
        )
        for name, vector in quantities.items()
    }
    return {label: len(indices) for label, indices in found.items()}, of_blocks
