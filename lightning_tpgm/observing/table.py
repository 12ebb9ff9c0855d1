"""The table that stands in the terminal when a fit has ended, with rich."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_tpgm.observing.reporting import PINNED, by_block, left

MOST = 24  # rows


def print_table(title: str, names: Sequence[str], quantities: Mapping[str, Tensor], verdict: str) -> None:
    """Print what was wanted and what was allowed, from the input's side of the network to the output's.

    Args:
        title: Stands above the table.
        names: Of T tensors; many are shown by block.
        quantities: Shape (T,) each, on the CPU.
        verdict: Stands below it.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    sizes, shown = by_block(names, quantities, MOST)
    columns = _columns(shown)
    table = Table(title=escape(title), caption=_caption(quantities))
    table.add_column("tensor" if len(sizes) == len(names) else "block", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right")
    for index, label in enumerate(sizes):
        table.add_row(escape(label), *(cell(index) for cell in columns.values()))
    console = Console()
    console.print(table)
    console.print(verdict, markup=False, highlight=False)


def _columns(shown: Mapping[str, Tensor]) -> dict[str, Callable[[int], str]]:
    """The cells of each column, by its heading."""

    def number(quantity: str) -> Callable[[int], str]:
        return lambda index: f"{float(shown[quantity][index]):.3g}"

    if "radius" not in shown:
        return {name: number(name) for name in ("distance", "omega") if name in shown}
    ratios = left(shown)
    before, after = ("wanted", "allowed") if "bound" in shown else ("before", "after")
    columns = {before: number("wanted"), after: number("allowed"), "ratio": lambda index: f"{float(ratios[index]):.3g}"}
    if "bound" in shown:
        bound = (100 * shown["bound"]).tolist()
        words = [", pinned" if share >= PINNED else "" for share in shown["pinned"].tolist()]
        columns["bound in steps"] = lambda index: f"{bound[index]:.0f} %{words[index]}"
    return columns


def _caption(quantities: Mapping[str, Tensor]) -> str:
    distance = quantities["distance"]
    caption = f"{len(distance)} tensors, total distance {float(distance.norm()):.3g}"
    if "bound" in quantities:
        pinned = int((quantities["pinned"] >= PINNED).sum())
        caption += f", {pinned} pinned\nwanted, allowed: mean distance before and after a step's projection"
    return caption
