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
        mars, else the Frobenius norm). DiGraP has ``omega``. Methods with radii have

        - ``radius``, and ``ratio``: what the last projection left of the deviation of the farthest row;
        - ``binds``: whether that was less than all;
        - ``wanted``, ``allowed``: the distance before and after a projection, as a mean over the tensor's steps;
        - ``bound``: the share of its steps in which a projection changed it;
        - ``pinned``: the share of its steps in which one left less than a tenth, so that the tensor was held at its
          anchor.

        After the fact (``when="fit_end"``, `project_checkpoint`) there is one projection. ``wanted`` is the distance
        before it, ``allowed`` the one after it. There are no shares of steps. ``pandas.DataFrame(callback.report())``
        makes a table of it.

        With parameters split over processes (FSDP2, tensor parallel) every process must call it.
        """
        return self.reporter.report(self.anchors.joined, self.quantities())

    def plot(self, over: Over = "layers", quantity: Quantity = "distance", ax: Any = None) -> tuple[Any, Any]:
        """Draw what the method did, after or during a fit.

        Args:
            over: ``"layers"``: what was wanted and what was allowed of each tensor, and in which share of its steps it
                was bound. The network's input is at the top. ``"steps"``: a heat map of one quantity, tensors by
                optimizer steps. More than 40 tensors are shown by block.
            quantity: What the heat map shows, a key of `report`: ``"ratio"`` shows when the constraint held.
            ax: Matplotlib axes to draw into. None: a new figure.

        Returns:
            The matplotlib figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: For an argument out of its range, before the first fit, or if the method has no such quantity.
        """
        return self.reporter.plot(self.anchors.joined, self.quantities(), over, quantity, ax)

    def explain(self) -> str:
        """The verdict: which part of the network was held, for how much of the run, and what that suggests.

        With parameters split over processes every process must call it.
        """
        return self.reporter.explain(self.anchors.joined, self.quantities())
