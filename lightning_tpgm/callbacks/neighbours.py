"""Callbacks beside each other in one trainer: what is refused of them, and what is said."""

from __future__ import annotations

from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING

from lightning_tpgm.callbacks.averages import averages, warn_of_averages
from lightning_tpgm.callbacks.framework import MisconfigurationException, callbacks_of, pl, rank_zero_warn
from lightning_tpgm.callbacks.surroundings import (
    check_radii_are_alone,
    check_unscaled_gradients,
    unfreezes,
)

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.method import MethodCallback


def check_neighbours(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """When a fit starts: everything about what else is in the trainer."""
    check_unscaled_gradients(trainer, callback)
    check_others(trainer, callback)
    warn_of_averages(trainer, callback)


def check_others(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """Refuse a second callback for the same parameters: one with radii after one with radii, or one of the same method.

    Also for parameters that are announced to thaw.
    """
    check_radii_are_alone(trainer, callback)
    for other in takewhile(lambda other: other is not callback, callbacks_of(trainer)):
        both = _acts_on(other, callback, trainer) & _acts_on(callback, callback, trainer)
        if both:
            raise MisconfigurationException(
                f"{other!r} and {callback!r} both act on {len(both)} tensors, {min(both)!r} among them. What the first"
                " does then counts twice, or for nothing. Exclude them in one."
            )


def _acts_on(callback: object, like: MethodCallback, trainer: pl.Trainer) -> set[str]:
    """The tensors that a callback acts on, now or later; none if it is not of the same method and moment."""
    constraint = getattr(callback, "_constraint", None)
    method = like._constraint.method
    if constraint is None or type(constraint.method) is not type(method):
        return set()
    if constraint.method.acts_at_end != method.acts_at_end:
        return set()
    return {*constraint.anchors.parameters, *(constraint.anchors.waiting if unfreezes(trainer) else ())}


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


def key_of(callback: MethodCallback, for_whom: FrameType) -> str:
    """Where a checkpoint has the callback's state; two callbacks of one key are explained to whoever compares keys.

    A trainer compares the keys of its callbacks when it is made, before it tells them anything. Its own error knows
    their class alone. So we look at who asks, to explain an error that is certain, and for nothing else.

    Args:
        callback: The one whose key is asked for.
        for_whom: The call that asks.

    Raises:
        MisconfigurationException: If a trainer asks that has another one of the same key.
    """
    key = _key(callback)
    callbacks = for_whom.f_locals.get("callbacks") if for_whom.f_code.co_name == "_validate_callbacks_list" else None
    for other in takewhile(lambda other: other is not callback, callbacks or ()):
        if type(other) is type(callback) and _key(other) == key:
            raise MisconfigurationException(
                f"{other!r} and {callback!r} have the same `exclude`, found {list(callback.exclude)}: both would act on"
                " the same parameters, and a checkpoint has one place for both. Leave one out, or exclude in each what"
                " the other acts on."
            )
    return key


def _key(callback: MethodCallback) -> str:
    return callback._generate_state_key(exclude=sorted(callback.exclude))
