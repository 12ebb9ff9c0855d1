"""The deviation of each tensor at the last step that it took part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_tpgm.anchors import capture, to_cpu
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Matrices
from lightning_tpgm.sharding import full, local


class LastStep:
    """Remembers D by name, rounded to its parameter's dtype, and split like it."""

    def __init__(self) -> None:
        self.deviations: dict[str, Tensor] = {}

    def known(self, tensors: Constrained) -> Tensor:
        """Which tensors have had a step, booleans of shape (T,)."""
        return tensors.which([name in self.deviations for name in tensors.names])

    def of(self, tensors: Constrained) -> Matrices:
        """What is remembered; zeros for a tensor that has had no step."""
        found = map(self.deviations.get, tensors.names)
        return tensors.arrange([None if value is None else local(value) for value in found])

    def memory(self, tensors: Constrained, which: Sequence[bool]) -> list[Tensor | None]:
        """Where the deviations of some tensors are to be written to, None for the others: over the remembered ones.

        That of a tensor without any is made here.
        """
        found: list[Tensor | None] = []
        for name, parameter, chosen in zip(tensors.names, tensors.parameters, which, strict=True):
            if chosen and name not in self.deviations:
                self.deviations[name] = torch.zeros_like(parameter, requires_grad=False)
            found.append(local(self.deviations[name]) if chosen else None)
        return found

    def swap(self, newer: LastStep, names: Sequence[str]) -> None:
        """Take over what was remembered of some tensors there; there goes on in the memory of what that replaces."""
        taken = {name: newer.deviations.pop(name) for name in names}
        newer.deviations |= {name: self.deviations[name] for name in names if name in self.deviations}
        self.deviations |= taken

    def state(self) -> dict[str, Tensor]:
        """The deviations, whole and on the CPU. Collective where tensors are split."""
        return {name: full(value).cpu() for name, value in self.deviations.items()}

    def load(self, deviations: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.deviations = dict(deviations)

    def place(self, tensors: Constrained) -> None:
        """Bring them to their parameters."""
        parameters = dict(zip(tensors.names, tensors.parameters, strict=True))
        self.deviations = {name: capture(value, parameters[name]) for name, value in self.deviations.items()}

    def release(self) -> None:
        """Bring them to the CPU."""
        self.deviations = to_cpu(self.deviations)
