"""Random generators that users' objects hold: found, seeded, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tpgm.callbacks.framework import classes
from lightning_tpgm.callbacks.opaque import is_of_the_system

_FEW = 100  # entries of a container that is looked into
_MANY = 1_000  # objects that are looked at


def snapshot(generator: Any) -> Callable[[], object] | None:
    """What puts a generator back into its present state; None for other objects."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):  # which has no state
        return partial(generator.setstate, generator.getstate())
    return None


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        generator.seed(seed)


@contextmanager
def put_back(owners: Iterable[Any], seed: int | None = None) -> Iterator[None]:
    """The generators that hang on these objects are as before on exit; inside they are seeded, if that is asked for.

    They are looked for among attributes and in short containers, at any depth, also behind bound methods.
    """
    found = list(_held_by(owners))
    undo = [back for generator in found if (back := snapshot(generator)) is not None]
    try:
        for generator in found if seed is not None else ():
            _seed(generator, seed)  # type: ignore[arg-type]
        yield
    finally:
        for back in undo:
            back()


def _held_by(owners: Iterable[Any]) -> Iterator[Any]:
    todo, seen = list(owners), set[int]()
    left_alone = (Tensor, np.ndarray, nn.Module, type, *classes("trainer:Trainer"))
    for value in todo:  # grows by what is found inside
        kind: Any = type(value)
        if id(value) in seen or len(seen) > _MANY or isinstance(value, left_alone):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            yield value
        elif isinstance(value, Mapping):
            todo += [*value.values()] if type(value) is dict and len(value) <= _FEW else []
        elif isinstance(value, list | tuple):
            todo += value if len(value) <= _FEW else ()
        elif isinstance(value, MethodType):
            todo.append(value.__self__)
        elif kind.__dictoffset__ and not is_of_the_system(kind):  # `hasattr` would ask a `__getattr__`
            todo += vars(value).values()
