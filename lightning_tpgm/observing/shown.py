"""What users ask of a constraint: anchors, radii, distances, a report, pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tpgm.anchors import Anchors
from lightning_tpgm.observing.reporter import Over, Quantities, Quantity, Reporter
from lightning_tpgm.observing.reporting import Row


class Shown:
    """Shows the quantities of what derives from it."""

    anchors: Anchors
    reporter: Reporter

    def quantities(self) -> Quantities:
        """What users see, by name, vectors of shape (T,); empty where nothing is constrained now."""
        raise NotImplementedError

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The pretrained value of each constrained parameter, by name."""
        return dict(self.anchors.joined)

    @property
    def radii(self) -> dict[str, float]:
        """The radius of each constrained parameter, by name; nan until it is first used. Empty without radii."""
        return self._by_name("radius")

    @property
    def distances(self) -> dict[str, float]:
        """The distance of each constrained parameter, by name: for methods with radii, after the last projection."""
        return self._by_name("distance")

    def _by_name(self, quantity: str) -> dict[str, float]:
        found = (self.quantities() or self.reporter.last).get(quantity)
        return {} if found is None else dict(zip(self.anchors.joined, found.tolist(), strict=True))

    def report(self) -> list[Row]:
        """What the method did so far, one dict per constrained tensor; empty before the first fit.

        Keys: ``name``, ``shape`` and ``distance`` (from the pretrained value: the largest row distance in the norm
        mars, else the Frobenius norm). Methods with radii have ``radius``, ``ratio`` (what the last projection left of
        the deviation of the farthest row; 1: inside the ball) and ``binds``; DiGraP has ``omega``.
        ``pandas.DataFrame(callback.report())`` makes a table of it.

        With parameters split over processes (FSDP2, tensor parallel) every process must call it.
        """
        return self.reporter.report(self.anchors.joined, self.quantities())

    def plot(self, over: Over = "layers", quantity: Quantity = "distance", ax: Any = None) -> tuple[Any, Any]:
        """Draw what the method did, after or during a fit.

        Args:
            over: ``"layers"``: radius and distance of each tensor now, from the input's side of the network to the
                output's. ``"steps"``: a heat map of one quantity, tensors by optimizer steps.
            quantity: What the heat map shows.
            ax: Matplotlib axes to draw into; None: a new figure.

        Returns:
            The matplotlib figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: For an argument out of its range, before the first fit, or if the method has no such quantity.
        """
        return self.reporter.plot(self.anchors.joined, self.quantities(), over, quantity, ax)
