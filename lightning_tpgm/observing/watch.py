"""What goes wrong silently when a pretrained module is fine-tuned, found by looking at numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_tpgm.projection import MIN_RADIUS


class Watch:
    """Follows the quantities of `lightning_tpgm.observing.reporting` and says each trouble once."""

    PATIENCE = 100  # steps until something should have moved, in a long run
    SHARE = 0.5  # of a run: for so long every constraint may bind, and in a short one nothing move
    LEAST = 10  # steps of which something can be said
    RESOLUTION = 1e-6  # of an anchor's size: a smaller movement is none

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._at_floor_since: int | None = None
        self._at_bound_since: tuple[int, Tensor] | None = None  # and the radii then

    def look(
        self, step: int, quantities: Mapping[str, Tensor], sizes: Callable[[], Tensor], growth: float, run: float
    ) -> Iterator[str]:
        """The troubles that are new; waits for the device.

        Args:
            step: How many optimizer steps there were.
            quantities: Shape (T,) each.
            sizes: Gives the norm of each anchor, shape (T,); asked for once.
            growth: By how much a radius can grow in a step.
            run: How many steps the run will have; infinite if nobody knows.
        """
        for trouble, text in self._troubles(step, quantities, sizes, growth, run):
            if trouble not in self._said:
                self._said.add(trouble)
                yield text

    def _troubles(
        self, step: int, quantities: Mapping[str, Tensor], sizes: Callable[[], Tensor], growth: float, run: float
    ) -> Iterator[tuple[str, str]]:
        share = max(self.SHARE * run, self.LEAST)
        patience = min(self.PATIENCE, share)
        if step >= patience and "moved" not in self._said:
            self._said.add("moved")  # one look is enough
            reach = quantities["distance"] / quantities.get("ratio", torch.ones(())).clamp(min=1e-30)
            size = sizes()
            size = size.where(size > 0, size[size > 0].min() if bool(size.any()) else 0)  # one that starts at zero
            if not bool((reach > self.RESOLUTION * size).any()):
                yield (
                    "still",
                    f"After {step} optimizer steps no constrained tensor has moved by more than {self.RESOLUTION:g} of"
                    " its size: there is nothing to constrain yet. Raise the learning rate, or check that the optimizer"
                    " holds these parameters and that they get gradients.",
                )
        if "radius" not in quantities:
            return
        begun = ~quantities["radius"].isnan()  # the other tensors have not moved
        radius, binds = quantities["radius"][begun], quantities["binds"][begun]
        if not bool(binds.any() & (radius <= MIN_RADIUS).all()):
            self._at_floor_since = None
        elif self._at_floor_since is None:
            self._at_floor_since = step
        elif step - self._at_floor_since >= patience:
            yield (
                "floor",
                f"For {step - self._at_floor_since} optimizer steps all {len(radius)} radii have been at their floor of"
                f" {MIN_RADIUS:g}: the weights stay where they were pretrained. Each step of the optimizer goes where"
                " the loss that the radii learn from is higher. Lower the learning rate. If the radii learn from"
                " held-out data, check that these are like the training data.",
            )
        if not bool(binds.any() & binds.all()):
            self._at_bound_since = None
        elif self._at_bound_since is None:
            self._at_bound_since = step, radius.clone()
        elif step - self._at_bound_since[0] >= share:
            since, radius_then = self._at_bound_since
            grown = float((radius - radius_then).median()) if radius.shape == radius_then.shape else 0.0
            if grown > growth * (step - since) / 2:
                yield (
                    "bound",
                    f"For {step - since} of {run:g} optimizer steps all {len(radius)} constraints have been at their"
                    " bound, while the radii grew about as fast as they can. So `radius_lr` sets how far the weights"
                    " get, not the data. Use `radius_lr` = 'auto', or raise it.",
                )
            self._at_bound_since = step, radius.clone()  # judge the next stretch by itself
