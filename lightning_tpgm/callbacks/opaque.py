"""Which classes are not ours to put back."""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ContextDecorator
from functools import cache
from io import IOBase
from itertools import count
from operator import length_hint
from types import SimpleNamespace
from typing import Any

FOREIGN = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy", "lightning_tpgm"}
)
_HARMLESS = frozenset(
    {"builtins", "collections", "collections.abc", "_collections", "_collections_abc", "abc", "typing", "_random"}
)
_PLAIN = frozenset(
    {SimpleNamespace, Namespace, *Namespace.__mro__, random.Random, AbstractContextManager, ContextDecorator}
)
_WAITING = frozenset({"threading", "queue", "concurrent", "multiprocessing", "asyncio", "subprocess"})
_WAITING_IN_C = frozenset({"_thread", "_queue", "_asyncio", "_multiprocessing"})


@cache
def is_of_the_system(kind: type) -> bool:
    """Whether a class is, or derives from, one of the standard library that is more than a container.

    Futures, events, queues, locks, pools and processes, files: put back to an earlier state, they would wait for ever.
    """
    return any(
        base not in _PLAIN and base.__module__ not in _HARMLESS and ships_with_python(base.__module__.partition(".")[0])
        for base in kind.__mro__
    )


@cache
def ships_with_python(package: str) -> bool:
    """Whether a package of this name is the standard library's: a project may have one of the same name."""
    file = getattr(sys.modules.get(package), "__file__", None)
    theirs = file is None or (file.startswith(os.path.dirname(os.__file__)) and "site-packages" not in file)
    return package in sys.stdlib_module_names and theirs


@cache
def is_iterator(kind: type) -> bool:
    """Whether a class is an iterator whose position is hidden: Python's own, generators, and a DataLoader's."""
    package = kind.__module__.partition(".")[0]
    ours = ships_with_python(package) or kind.__module__.startswith("torch.utils.data")
    return ours and issubclass(kind, Iterator) and not issubclass(kind, IOBase)


def position(iterator: Iterator[Any]) -> int | str | None:
    """How far an iterator is, if that can be told."""
    if isinstance(iterator, count):
        return repr(iterator)
    drawn: int | None = getattr(iterator, "_num_yielded", None)  # a DataLoader's
    return length_hint(iterator) or None if drawn is None else drawn


def holds_what_waits(parts: Collection[Any]) -> bool:
    """Whether one of an object's attributes is a thread, lock, event, queue, future, pool or process.

    Such an object has another thread write to it. Put back to an earlier state, it would wait for ever.
    """
    kinds: set[Any] = set(map(type, parts))
    return any(_waits(kind) for kind in kinds)


@cache
def _waits(kind: type) -> bool:
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return bool(packages & _WAITING_IN_C) or any(map(ships_with_python, packages & _WAITING))
