"""What a method did to the constrained tensors, in few numbers.

Quantities are vectors of shape (T,) for T constrained tensors: the ``distance`` of each from its anchor, its
``radius``, the ``ratio`` that the projection left of the deviation of its farthest row (1: inside the ball), whether
the constraint ``binds``, and ``omega`` (DiGraP).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PER_TENSOR = ("radius", "distance", "omega")
"""The quantities that are logged and kept for each tensor."""
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


def print_table(title: str, rows: Sequence[Row], each_end: int = 10) -> None:
    """Print the tensors that moved most and least, the farthest first, with rich.

    Args:
        title: Stands above the table.
        rows: From `rows_of`, at least one.
        each_end: How many tensors are shown at each end.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    ordered = sorted(rows, key=lambda row: row["distance"], reverse=True)
    left_out = max(0, len(ordered) - 2 * each_end)
    numbers = [column for column in ("radius", "distance", "ratio", "omega") if column in rows[0]]
    table = Table(title=escape(title), caption=_caption(rows, numbers))
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    for column in numbers:
        table.add_column(column, justify="right")
    if "binds" in rows[0]:
        table.add_column("binds")
    for index, row in enumerate(ordered):
        if left_out and each_end <= index < each_end + left_out:
            if index == each_end:
                table.add_row(f"... {left_out} more")
            continue
        cells = [escape(row["name"]), "×".join(map(str, row["shape"])), *(f"{row[column]:.3g}" for column in numbers)]
        if "binds" in row:
            cells.append("yes" if row["binds"] else "no")
        table.add_row(*cells)
    Console().print(table)


def _caption(rows: Sequence[Row], numbers: Sequence[str]) -> str:
    total = sum(row["distance"] ** 2 for row in rows) ** 0.5
    caption = f"{len(rows)} tensors, total distance {total:.3g}"
    if "ratio" in numbers:
        mean = sum(row["ratio"] for row in rows) / len(rows)
        caption += f", {sum(row['binds'] for row in rows)} constraints bind, mean ratio {mean:.3g}"
    return caption
