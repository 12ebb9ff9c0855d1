"""The weights of each tensor at the last step that it took part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
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

    def remember(self, tensors: Constrained, which: Sequence[bool]) -> None:
        """Keep the present weights of some tensors, in the memory of those of their last step."""
        present = {
            name: parameter
            for name, parameter, chosen in zip(tensors.names, tensors.parameters, which, strict=True)
            if chosen
        }
        known = [name for name in present if name in self.weights]
        if known:
            mine, theirs = ([local(of[name]) for name in known] for of in (self.weights, present))
            torch._foreach_copy_(mine, theirs)
        self.weights |= {name: capture(p, p) for name, p in present.items() if name not in self.weights}

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
