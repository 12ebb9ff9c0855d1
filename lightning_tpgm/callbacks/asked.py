"""What users ask of any callback: anchors, a report, pictures, a verdict."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tpgm.constraint import Constraint
from lightning_tpgm.observing.reporter import Over, Quantity
from lightning_tpgm.observing.reporting import Row


class Asked:
    """A callback that passes the questions on to its constraint."""

    _constraint: Constraint

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The pretrained value of each constrained parameter, by name; empty before the first fit."""
        return self._constraint.anchor

    def report(self) -> list[Row]:  # noqa: D102
        return self._constraint.report()

    def plot(self, over: Over = "layers", quantity: Quantity = "distance", ax: Any = None) -> tuple[Any, Any]:  # noqa: D102
        return self._constraint.plot(over, quantity, ax)

    def explain(self) -> str:  # noqa: D102
        return self._constraint.explain()

    report.__doc__, plot.__doc__ = Constraint.report.__doc__, Constraint.plot.__doc__
    explain.__doc__ = Constraint.explain.__doc__
