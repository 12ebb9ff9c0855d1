"""What users see of a method: a report, pictures, a table, warnings, and what a logger is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_tpgm.observing.history import History
from lightning_tpgm.observing.leaving import Leaving
from lightning_tpgm.observing.plotting import plot_layers, plot_steps
from lightning_tpgm.observing.reporting import LOGGED, PER_TENSOR, Row, by_name, rows_of
from lightning_tpgm.observing.table import print_table
from lightning_tpgm.observing.verdict import explain
from lightning_tpgm.observing.watch import Watch

Over = Literal["layers", "steps"]
Quantity = Literal["distance", "radius", "ratio", "bound", "omega"]
Quantities = Mapping[str, Tensor]


class Reporter:
    """Records the quantities of all constrained tensors, and shows them.

    Quantities come by name, see `lightning_tpgm.observing.reporting`. Empty ones mean that nothing is constrained now.
    Then the last ones of the fit are shown.

    Args:
        title: The method's name.
        growth: By how much a radius can grow in a step, see `lightning_tpgm.methods.method.Method.growth`.
    """

    def __init__(self, title: str, growth: float) -> None:
        self.title, self.growth = title, growth
        self.history = History()
        self.leaving = Leaving()
        self.order: Sequence[str] = ()  # of the model's parameters; those that thawed late were constrained last
        self.last: Quantities = {}  # at the end of the fit, on the CPU
        self._watch = Watch()
        self.run = math.inf  # optimizer steps, as far as anybody knows

    def record(self, quantities: Callable[[], Quantities], every: int) -> None:
        """Called after each optimizer step; ``every`` is how often the quantities are asked for at most."""
        if self.history.due(every):
            found = quantities()
            self.history.add({name: value for name, value in found.items() if name in PER_TENSOR})
            self.leaving.note(found)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with a history that was kept; older checkpoints have none."""
        self.history = History()
        if state:
            self.history.load_state_dict(dict(state))
        self.leaving.begin(self.history.values.get("radius", []))

    def conclude(self, quantities: Quantities) -> None:
        """Keep what is to be shown from now on, and nothing on the device."""
        if quantities:
            self.last = {name: vector.clone().cpu() for name, vector in quantities.items()}
        self.history.leave_device()

    def leave_device(self) -> None:
        """Keep everything on the CPU."""
        self.history.leave_device()
        self.leaving.leave_device()

    def report(self, anchors: Mapping[str, Tensor], quantities: Quantities) -> list[Row]:
        """One dict per constrained tensor; empty before the first fit."""
        names, found = self._in_order(anchors, quantities or self.last)
        return rows_of({name: anchors[name] for name in names}, found)

    def each(self, prefix: str, anchors: Mapping[str, Tensor], quantities: Quantities) -> dict[str, float]:
        """Each tensor's numbers, as ``PREFIX_radius/NAME``; waits for the device."""
        found: dict[str, float] = {}
        for name in (name for name in LOGGED if name in quantities):
            found |= by_name(f"{prefix}_{name}/", anchors, quantities[name])
        return found

    def print_table(self, anchors: Mapping[str, Tensor]) -> None:
        """Print what was wanted and what was allowed, and the verdict, if there was a fit."""
        if self.last:
            print_table(self.title, *self._in_order(anchors, self.last), self.explain(anchors, {}))

    def explain(self, anchors: Mapping[str, Tensor], quantities: Quantities) -> str:
        """The verdict in words; waits for the device."""
        names, found = self._in_order(anchors, quantities or self.last)
        return explain(names, found, self.history.count, is_fixed=self.growth < math.inf)

    def plot(
        self, anchors: Mapping[str, Tensor], quantities: Quantities, over: Over, quantity: Quantity, ax: Any
    ) -> tuple[Any, Any]:
        """Draw layers, or a heat map of one quantity; see `lightning_tpgm.Constraint.plot`."""
        now = quantities or self.last
        if over not in ("layers", "steps"):
            raise ValueError(f"`over` should be 'layers' or 'steps', found {over!r}.")
        if not now:
            raise ValueError(f"{self.title} has nothing to draw yet. Plot during or after a fit.")
        title = self.title.removesuffix("Callback")
        if over == "layers":
            return plot_layers(*self._in_order(anchors, now), title, ax)
        if quantity not in now:
            raise ValueError(f"`quantity` should be one of {[q for q in PER_TENSOR if q in now]}, found {quantity!r}.")
        steps, matrix = self.history.with_present(quantity, now[quantity])
        names, ordered = self._in_order(anchors, {quantity: matrix})
        return plot_steps(names, steps, ordered[quantity], title, quantity, ax)

    def _in_order(self, anchors: Mapping[str, Tensor], found: Quantities) -> tuple[list[str], Quantities]:
        """Names and quantities, shape (..., T), on the CPU in the order of the model; waits for the device."""
        place = {name: index for index, name in enumerate(self.order)}
        names = list(anchors)
        columns = sorted(range(len(names)), key=lambda column: place.get(names[column], len(place)))
        return [names[at] for at in columns], {name: vector.cpu()[..., columns] for name, vector in found.items()}

    def troubles(self, quantities: Quantities, sizes: Callable[[], Tensor]) -> Iterator[str]:
        """What goes wrong silently, each once; see `lightning_tpgm.observing.watch.Watch.look`."""
        if quantities:
            for trouble in self._watch.look(self.history.count, quantities, sizes, self.growth, self.run):
                yield f"{self.title}: {trouble}"

    def outside(self, names: Sequence[str]) -> Iterator[str]:
        """Which tensors were found outside of their balls, once; see `lightning_tpgm.observing.leaving.Leaving`."""
        for text in self.leaving.texts(names):
            yield f"{self.title}: {text}"
