"""Random generators that users' objects hold: found, seeded, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tpgm.callbacks.framework import classes
from lightning_tpgm.callbacks.opaque import is_of_the_system

_FEW = 100  # entries of a container that is looked into
_MANY = 1_000  # objects that are looked at


class Kind(NamedTuple):
    """What can be done with a kind of generator."""

    state: Callable[[Any], Any]
    set_state: Callable[[Any, Any], object]
    seed: Callable[[Any, int], object]


def _set_numpy(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


_KINDS: dict[type, Kind] = {
    torch.Generator: Kind(
        lambda generator: generator.get_state(),
        lambda generator, state: generator.set_state(state),
        lambda generator, seed: generator.manual_seed(seed),
    ),
    np.random.Generator: Kind(
        lambda generator: generator.bit_generator.state,
        _set_numpy,
        lambda generator, seed: _set_numpy(generator, type(generator.bit_generator)(seed).state),
    ),
    np.random.RandomState: Kind(
        lambda generator: generator.get_state(),
        lambda generator, state: generator.set_state(state),
        lambda generator, seed: generator.seed(seed % 2**32),
    ),
    random.Random: Kind(
        lambda generator: generator.getstate(),
        lambda generator, state: generator.setstate(state),
        lambda generator, seed: generator.seed(seed),
    ),
}


def _kind(value: object) -> Kind | None:
    if isinstance(value, random.SystemRandom):  # it has no state
        return None
    return next((kind for cls, kind in _KINDS.items() if isinstance(value, cls)), None)


def snapshot(generator: Any) -> Callable[[], object] | None:
    """What puts a generator back into its present state; None for other objects."""
    kind = _kind(generator)
    return None if kind is None else partial(kind.set_state, generator, kind.state(generator))


def seed_torch(seed: int) -> None:
    """`torch.manual_seed`, which writes down the stack for each kind of GPU that a machine does not have."""
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is None or accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def generators_put_back(owners: Iterable[Any], seed: int | None = None) -> Iterator[None]:
    """The generators that hang on these objects are as before on exit; inside they are seeded, if that is asked for.

    They are looked for among attributes and in short containers, at any depth, also behind bound methods.
    """
    found = [(generator, kind, kind.state(generator)) for generator, kind in _held_by(owners)]
    try:
        for generator, kind, _ in found if seed is not None else ():
            kind.seed(generator, seed)  # type: ignore[arg-type]
        yield
    finally:
        for generator, kind, state in found:
            kind.set_state(generator, state)


def _held_by(owners: Iterable[Any]) -> Iterator[tuple[Any, Kind]]:
    todo, seen = list(owners), set[int]()
    left_alone = (Tensor, np.ndarray, nn.Module, type, *classes("trainer:Trainer"))
    for value in todo:  # grows by what is found inside
        kind: Any = type(value)
        if id(value) in seen or len(seen) > _MANY or isinstance(value, left_alone):
            continue
        seen.add(id(value))
        if (found := _kind(value)) is not None:
            yield value, found
        elif isinstance(value, Mapping):
            todo += [*value.values()] if type(value) is dict and len(value) <= _FEW else []
        elif isinstance(value, list | tuple):
            todo += value if len(value) <= _FEW else ()
        elif isinstance(value, MethodType):
            todo.append(value.__self__)
        elif kind.__dictoffset__ and not is_of_the_system(kind):  # `hasattr` would ask a `__getattr__`
            todo += vars(value).values()
