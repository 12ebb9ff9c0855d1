"""One learned scalar per constrained tensor, a radius for instance, held as one vector with the Adam that moves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tpgm.projection import legal_radius


class LearnedScalars:
    """Values and Adam state, as vectors of one entry per constrained tensor.

    The Adam update equals `torch.optim.Adam` (a test holds them together). It is written out because each scalar counts
    its own updates (tensors may join during training), and because an update must be skippable by a condition that
    lives on the device: reading it back would stall a GPU on every step.

    Args:
        lr: Learning rate.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8
    _VECTORS = ("value", "exp_avg", "exp_avg_sq", "step")

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.names: list[str] = []
        self.value = self.exp_avg = self.exp_avg_sq = self.step = torch.empty(0)

    def to(self, like: Tensor) -> None:
        """Give the vectors the device and dtype (float32 or float64) of another tensor."""
        for name in self._VECTORS:
            setattr(self, name, getattr(self, name).to(like))

    def add(self, names: Sequence[str]) -> None:
        """Let tensors join; their scalars are not a number until `start` gives them one."""
        self.names += names
        new = self.value.new_zeros(len(names))
        self.value = torch.cat([self.value, torch.full_like(new, torch.nan)])
        self.exp_avg, self.exp_avg_sq, self.step = (
            torch.cat([old, new]) for old in (self.exp_avg, self.exp_avg_sq, self.step)
        )

    def start(self, value: Tensor, where: Tensor | bool = True) -> None:
        """Give every scalar that has no value yet this one, shape (T,) or (), if ``where`` is true."""
        self.value = torch.where(self.value.isnan() & where, value, self.value)

    def adam(self, grad: Tensor, where: Tensor) -> None:
        """One Adam step on the scalars at which ``where`` is true; the others keep value and state to the bit.

        Args:
            grad: The derivative of the loss, shape (T,).
            where: Booleans, shape (T,) or ().

        Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
        """
        beta1, beta2 = self.BETAS
        step = self.step + 1
        exp_avg = torch.lerp(self.exp_avg, grad, 1 - beta1)
        exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * grad.square()
        # 1 - beta^step by expm1: the plain form loses four digits in float32 when beta^step is close to 1
        m = exp_avg / -torch.expm1(step * math.log(beta1))
        v = exp_avg_sq / -torch.expm1(step * math.log(beta2))
        value = self.value - self.lr * m / (v.sqrt() + self.EPS)
        for name, new in zip(self._VECTORS, (value, exp_avg, exp_avg_sq, step), strict=True):
            setattr(self, name, torch.where(where, new, getattr(self, name)))

    def as_dict(self) -> dict[str, float]:
        """The scalars by parameter name; waits for the device."""
        return dict(zip(self.names, self.value.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Names and vectors, on the CPU."""
        return {"names": list(self.names), **{name: getattr(self, name).cpu() for name in self._VECTORS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over names and vectors."""
        self.names = list(state["names"])
        for name in self._VECTORS:
            setattr(self, name, state[name])


class Radii(LearnedScalars):
    """The radii of all constrained tensors."""

    def clamp(self, largest: Tensor, where: Tensor) -> None:
        """Make radii legal, if ``where`` is true: [1e-8, largest row distance], see `projection.legal_radius`."""
        self.value = torch.where(where, legal_radius(self.value, largest), self.value)

    @property
    def bounds(self) -> Tensor:
        """The radii, infinite where there is none yet."""
        return self.value.nan_to_num(nan=torch.inf)
