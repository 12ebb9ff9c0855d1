"""The weights of each tensor at the last step that it took part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_tpgm.anchors import capture, to_cpu
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Matrices
from lightning_tpgm.sharding import full, local


class LastStep:
    """Remembers weights by name, split like their parameters."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def known(self, tensors: Constrained) -> Tensor:
        """Which tensors have had a step, booleans of shape (T,)."""
        return tensors.vector([name in self.weights for name in tensors.names])

    def of(self, tensors: Constrained) -> Matrices:
        """The remembered weights; the present ones of a tensor that has had no step."""
        named = zip(tensors.names, tensors.parameters, strict=True)
        return tensors.arrange([local(self.weights.get(name, present)) for name, present in named])

    def memory(self, tensors: Constrained, which: Sequence[bool]) -> list[Tensor | None]:
        """Where the present weights of some tensors are to be copied to, None for the others: over the remembered ones.

        That of a tensor without any is made here, and holds its present weights.
        """
        found: list[Tensor | None] = []
        for name, parameter, chosen in zip(tensors.names, tensors.parameters, which, strict=True):
            if chosen and name not in self.weights:
                self.weights[name] = capture(parameter, parameter)
            found.append(local(self.weights[name]) if chosen else None)
        return found

    def swap(self, newer: LastStep, names: Sequence[str]) -> None:
        """Take over what was remembered of some tensors there; there goes on in the memory of what that replaces."""
        taken = {name: newer.weights.pop(name) for name in names}
        newer.weights |= {name: self.weights[name] for name in names if name in self.weights}
        self.weights |= taken

    def state(self) -> dict[str, Tensor]:
        """The weights, whole and on the CPU. Collective where tensors are split."""
        return {name: full(weight).cpu() for name, weight in self.weights.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.weights = dict(weights)

    def place(self, tensors: Constrained) -> None:
        """Bring the weights to their parameters."""
        parameters = dict(zip(tensors.names, tensors.parameters, strict=True))
        self.weights = {name: capture(value, parameters[name]) for name, value in self.weights.items()}

    def release(self) -> None:
        """Bring them to the CPU."""
        self.weights = to_cpu(self.weights)
