"""One learned scalar per constrained tensor, a radius for instance, held as one vector with the Adam that moves it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_tpgm.constrained import Constrained


class LearnedScalars:
    """Values and Adam state, as vectors of one entry per constrained tensor.

    The Adam update equals `torch.optim.Adam` (a test holds them together). It is written out for two reasons. Each
    scalar counts its own updates, since tensors may join during training. And a condition that lives on the device must
    be able to skip an update. To read it back would stall a GPU on every step.

    Args:
        lr: Learning rate.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8
    TINY = 1e-20
    _ADAM = ("value", "exp_avg", "exp_avg_sq", "step")
    _MORE: tuple[str, ...] = ()  # vectors of a subclass, 0 for a tensor that joins

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.names: list[str] = []
        for name in self._vectors:
            setattr(self, name, torch.empty(0))

    @property
    def _vectors(self) -> tuple[str, ...]:
        return self._ADAM + self._MORE

    def place(self, tensors: Constrained) -> None:
        """Give the vectors the device of the tensors, and the dtype of their distances (float32 or float64)."""
        for name in self._vectors:
            setattr(self, name, getattr(self, name).to(tensors.scalar()))

    def release(self) -> None:
        """Bring the vectors to the CPU."""
        for name in self._vectors:
            setattr(self, name, getattr(self, name).cpu())

    def add(self, names: Sequence[str]) -> None:
        """Let tensors join; their scalars are not a number until `start` gives them one."""
        self.names = [*self.names, *names]
        zeros = self.value.new_zeros(len(names))
        for name in self._vectors:
            new = torch.full_like(zeros, torch.nan) if name == "value" else zeros
            setattr(self, name, torch.cat([getattr(self, name), new]))

    @contextmanager
    def of(self, tensors: Constrained) -> Iterator[Self]:
        """The scalars of these tensors alone; what is done to them inside is done to the whole on exit."""
        if tensors.at is None:
            yield self
            return
        part = copy(self)
        for name in self._vectors:
            setattr(part, name, getattr(self, name)[tensors.at])
        try:
            yield part
        finally:
            for name in self._vectors:
                setattr(self, name, getattr(self, name).index_copy(0, tensors.at, getattr(part, name)))

    def start(self, value: Tensor, where: Tensor | bool = True) -> None:
        """Give every scalar that has no value yet this one, shape (T,) or (), if ``where`` is true."""
        self.value = torch.where(self.value.isnan() & where, value, self.value)

    def adam(self, grad: Tensor, where: Tensor, lr: Tensor | None = None) -> None:
        """One Adam step on the scalars at which ``where`` is true. The others keep value and state to the bit.

        So do those whose gradient, or its square, is not finite: what enters here never leaves.

        Args:
            grad: The derivative of the loss, shape (T,).
            where: Booleans, shape (T,) or ().
            lr: A rate for each scalar, shape (T,). Then a step is their share that the gradients agree on. The first
                moment is not corrected for its start at zero, and Adam's epsilon does not count.

        Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
        """
        beta1, beta2 = self.BETAS
        exp_avg = torch.lerp(self.exp_avg, grad, 1 - beta1)
        exp_avg_sq = (beta2 * self.exp_avg_sq).addcmul(grad, grad, value=1 - beta2)
        where = where & (exp_avg_sq < torch.inf)  # if it is finite, so is the gradient
        self.step = self.step + where
        # 1 - beta^step by expm1: the plain form loses four digits in float32 when beta^step is close to 1
        m = exp_avg if lr is not None else exp_avg / -torch.expm1(self.step * math.log(beta1))
        v = exp_avg_sq / -torch.expm1(self.step * math.log(beta2))
        rate, eps = (self.lr, self.EPS) if lr is None else (lr, self.TINY)
        value = self.value - rate * m / (v.sqrt() + eps)
        for name, new in (("value", value), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            setattr(self, name, torch.where(where, new, getattr(self, name)))

    def as_dict(self) -> dict[str, float]:
        """The scalars by parameter name; waits for the device."""
        return dict(zip(self.names, self.value.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Names and vectors, on the CPU."""
        return {"names": list(self.names), **{name: getattr(self, name).cpu() for name in self._ADAM}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over names and vectors."""
        self.names = list(state["names"])
        for name in self._ADAM:
            setattr(self, name, state[name])
