"""What the callbacks of methods with radii tell."""

from __future__ import annotations

from typing import cast

from lightning_tpgm.constraint import Constraint
from lightning_tpgm.methods import FTP, TPGM
from lightning_tpgm.methods.radii import Radii


class WithRadii:
    """A callback whose method has a radius for each tensor."""

    _constraint: Constraint

    @property
    def radii(self) -> dict[str, float]:
        """The radius of each constrained parameter, by name; empty before the first fit, nan until it is first used."""
        return self._radii.as_dict()

    @property
    def distances(self) -> dict[str, float]:
        """The largest row distance of each constrained parameter after the last projection, by name."""
        return dict(zip(self._radii.names, self._radii.distance.tolist(), strict=True))

    @property
    def _radii(self) -> Radii:
        return cast(TPGM | FTP, self._constraint.method).radii
