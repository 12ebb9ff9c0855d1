"""Callbacks beside each other in one trainer: what is refused of them, and what is said."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from lightning_tpgm.callbacks.averages import averages, warn_of_averages
from lightning_tpgm.callbacks.framework import MisconfigurationException, callbacks_of, pl, rank_zero_warn
from lightning_tpgm.callbacks.surroundings import check_unscaled_gradients, unfreezes
from lightning_tpgm.constraint import Constraint

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.method import MethodCallback


def check_neighbours(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """When a fit starts: everything about what else is in the trainer."""
    check_unscaled_gradients(trainer, callback)
    check_others(trainer, callback)
    warn_of_averages(trainer, callback)


def check_others(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """Refuse a second callback for the same tensors: one of the same method and moment, or two that keep balls.

    Also for parameters that are announced to thaw.
    """
    later = unfreezes(trainer)
    here = callback._constraint
    for other in takewhile(lambda other: other is not callback, callbacks_of(trainer)):
        there = getattr(other, "_constraint", None)
        if isinstance(there, Constraint) and _collide(there, here):
            both = _tensors(there, later) & _tensors(here, later)
            if both:
                raise MisconfigurationException(
                    f"{other!r} and {callback!r} both act on {len(both)} tensors, {min(both)!r} among them. What the"
                    " first does then counts twice, or for nothing. Exclude them in one."
                )


def _collide(a: Constraint, b: Constraint) -> bool:
    """Whether the two cannot act on one tensor."""
    same = type(a.method) is type(b.method) and a.method.acts_at_end == b.method.acts_at_end
    return same or (a.at_hand and b.at_hand)


def _tensors(constraint: Constraint, later: bool) -> set[str]:
    """The tensors that a constraint acts on, now or later."""
    return {*constraint.anchors.parameters, *(constraint.anchors.waiting if later else ())}


def warn_of_leaving(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """When a fit has ended: warn of weights that are outside of their balls.

    Not where averages of weights that were never projected have overwritten what the callback does at the end: of these
    `warn_of_averages` has warned.
    """
    others = callbacks_of(trainer)
    overwritten = any(map(averages, others[others.index(callback) :]))
    if not (callback._constraint.method.acts_at_end and overwritten):
        for trouble in callback._constraint.outside():
            rank_zero_warn(trouble)
