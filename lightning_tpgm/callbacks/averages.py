"""Lightning's callbacks that write averages of weights into the module, beside what acts there itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_tpgm.callbacks.framework import Callback, callbacks_of, exchange_average, pl, rank_zero_warn

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.method import MethodCallback

WITH_A_SWAP = "WeightAveraging"  # by name: older releases of Lightning lack it


def averages(callback: Callback) -> bool:
    """Whether a callback writes an average into the module when the training ends."""
    return _is_a(callback, "StochasticWeightAveraging") or _is_a(callback, WITH_A_SWAP)


def _is_a(callback: Callback, name: str) -> bool:
    return name in {base.__name__ for base in type(callback).__mro__}


def warn_of_averages(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """Warn of callbacks that will overwrite what this one does at the end of the fit."""
    if not callback._constraint.method.acts_at_end:
        return
    callbacks = callbacks_of(trainer)
    for other in filter(averages, callbacks[callbacks.index(callback) + 1 :]):
        name, other_name = type(callback).__name__, type(other).__name__
        rank_zero_warn(
            f"At the end of the fit {other_name} writes its average into the module, after {name} has acted."
            f" Nothing of that will remain. List {other_name} before {name}."
        )


@contextmanager
def averages_held_still(trainer: pl.Trainer) -> Iterator[None]:
    """What is validated inside are the weights that the module holds: no callback swaps its average in."""
    callbacks = callbacks_of(trainer)
    try:
        vars(trainer)["callbacks"] = [callback for callback in callbacks if not averages(callback)]
        yield
    finally:
        vars(trainer)["callbacks"] = callbacks


def end_averages(callbacks: Sequence[Callback]) -> Callable[[], None]:
    """The module holds these averages, and will hold other weights: those are validated and saved from now on.

    Returns:
        What takes that back.
    """
    ended = [(callback, exchange_average(callback)) for callback in callbacks if _is_a(callback, WITH_A_SWAP)]

    def back() -> None:
        for callback, average in ended:
            exchange_average(callback, average)

    return back
