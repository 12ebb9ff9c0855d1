"""What a method is: its mathematics and its state, over tensors that somebody else found and steps that others take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.norms import Norm


@dataclass(frozen=True)
class Step:
    """One step of an optimizer, and the optimizer's index among all."""

    optimizer: Optimizer
    index: int

    def moved(self, tensors: Constrained) -> Tensor:
        """Which of its tensors it moved, booleans of shape (T,): all of them, or none.

        A fused optimizer that steps under a gradient scaler holds a flag meanwhile, and may skip the step. To read the
        flag here would make a GPU wait.
        """
        skipped = getattr(self.optimizer, "found_inf", None)
        return tensors.every if skipped is None else tensors.every & (skipped == 0)


@runtime_checkable
class Part(Protocol):
    """What a method is made of: scalars of each tensor, the last step."""

    def place(self, tensors: Constrained) -> None:
        """See `Method.place`."""

    def release(self) -> None:
        """See `Method.release`."""


class Method:
    """Derive from it and write what the method needs; all calls are under ``torch.no_grad``.

    Attributes:
        norm: What a distance is.
        reads_gradients: Whether it needs the gradients that the optimizer uses, unscaled.
        changes_gradients: Whether `change_gradients` does something; then `reads_gradients` is true as well.
        lowers_loss: Whether what it learns lowers the loss of a training step.
        has_radii: Whether it keeps each tensor inside a ball of its own after every step.
        acts_at_end: Whether it acts once, in `finish`, and never after a step.
        constrains_buffers: Whether buffers are constrained as well.
        is_taken: Whether the object was given to a model: it learns of one alone.
    """

    norm: Norm = "l2"
    reads_gradients: bool = False
    changes_gradients: bool = False
    lowers_loss: bool = False
    has_radii: bool = False
    acts_at_end: bool = False
    constrains_buffers: bool = False
    is_taken: bool = False

    def joined(self, tensors: Constrained, names: Sequence[str]) -> None:
        """These have become constrained; they are the last ones of all tensors, which come with them."""

    def before(self, tensors: Constrained, step: Step) -> None:
        """Right before a step of the optimizer that steps these tensors; there may be no gradients yet.

        If the first call of the step's closure freezes or thaws some, it is called again: the last call counts.
        """

    def change_gradients(self, tensors: Constrained, step: Step) -> None:
        """The gradients of these tensors are there, and not used yet."""

    def after(self, tensors: Constrained, step: Step) -> None:
        """Right after a step that really happened, before anything else sees the weights."""

    def finish(self, tensors: Constrained) -> None:
        """After the last step."""

    def quantities(self, tensors: Constrained) -> dict[str, Tensor]:
        """What users see, by name (see `lightning_tpgm.observing.reporting`), shape (T,) each, of all tensors."""
        return {"distance": tensors.distance(tensors.weights())}

    def growth(self) -> float:
        """By how much a radius can grow in an optimizer step."""
        return 0.0

    def state(self) -> dict[str, Any]:
        """What was learned, for a checkpoint: tensors on the CPU, plain numbers, dicts and lists. May be collective."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""

    def place(self, tensors: Constrained) -> None:
        """Bring what was learned to where the tensors are."""
        for part in self._parts():
            part.place(tensors)

    def release(self) -> None:
        """No step follows: bring what `state` needs to the CPU, and let go of all else."""
        for part in self._parts():
            part.release()

    def _parts(self) -> list[Part]:
        return [value for value in vars(self).values() if isinstance(value, Part)]


def check(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise a ValueError about an argument unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` should be {expected}, found {found!r}.")


def is_flag(value: object) -> bool:
    """Whether the value is True or False, numpy's included."""
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def is_number(value: object) -> bool:
    """Whether the value is a finite real number, numpy's included; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)


def is_count(value: object) -> bool:
    """Whether the value is a positive integer, numpy's included."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) > 0
