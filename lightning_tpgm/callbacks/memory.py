"""Remembering what hangs on a module, so that it can be put back in place: containers, objects, generators, arrays."""

from __future__ import annotations

import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from functools import cache, partial
from itertools import islice
from operator import is_
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tpgm.callbacks.framework import classes
from lightning_tpgm.callbacks.generators import snapshot
from lightning_tpgm.callbacks.opaque import FOREIGN, holds_what_waits, is_iterator, is_of_the_system, ships_with_python
from lightning_tpgm.callbacks.weights import SMALL

ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
MANY = 1_000  # entries of a container: of more only those that are appended are taken back
_SHORT = 16
_ENOUGH = 10_000  # entries of all containers of one attribute
_OPAQUE = (
    *(Tensor, type, ModuleType, FunctionType),
    *(torch.utils.data.Dataset, torch.utils.data.DataLoader),
)
_MISSING = object()


class Known:
    """What evaluations have shown of each object: whether they change it. Forgets objects that are gone."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Any], bool]] = {}

    def changes(self, value: Any) -> bool | None:
        """Whether an evaluation changed it; None if none has seen it yet."""
        ref, changes = self._found.get(id(value), (None, None))
        return changes if ref is not None and ref() is value else None

    def learn(self, value: Any, changes: bool) -> None:
        """Remember it."""
        key = id(value)
        self._found[key] = weakref.ref(value, lambda _: self._found.pop(key, None)), changes


class Memory:
    """Remembers values so that each can be restored *in place*: whoever else holds them sees them restored too.

    Args:
        known: Which arrays evaluations change.

    Attributes:
        tensors: Those that were met.
        hidden: Modules that were met.
        iterators: Those that were met.
    """

    def __init__(self, known: Known) -> None:
        lightning = ("trainer:Trainer", "core:LightningDataModule", "callbacks:Callback")
        self.tensors: dict[int, Tensor] = {}
        self.hidden: dict[int, nn.Module] = {}
        self.iterators: list[Iterator[Any]] = []
        self._opaque = (*_OPAQUE, *(found for name in lightning for found in classes(name)))
        self._known = known
        self._undo: list[Callable[[], object]] = []
        self._short: list[tuple[list[Any], list[Any]]] = []  # lists, and what they held
        self._seen: dict[int, Any] = {}
        self._left = _ENOUGH

    def restore(self) -> None:
        """Undo everything, also what comes after an undo that raises."""
        with ExitStack() as stack:  # last in, first out
            for undo in self._undo:
                stack.callback(undo)
        for value, kept in self._short:
            if not same_items(value, kept):
                value[:] = kept

    def keep_plain(self, value: Any) -> bool:
        """Remember a value that is as simple as most are, if it is, at little cost; says whether it is."""
        kind = type(value)
        if kind is tuple:
            return len(value) > MANY or ATOMS.issuperset(map(type, value))  # it cannot change
        if kind is list and len(value) <= _SHORT and ATOMS.issuperset(map(type, value)):
            self._short.append((value, value.copy()))
            return True
        return False

    def keep(self, value: Any) -> None:
        """Remember the value of an attribute and what it holds."""
        self._left = _ENOUGH
        todo = [value]  # no recursion: a list may hold a list that holds a list, for ever
        for found in todo:  # grows by what is found inside
            if id(found) not in self._seen:
                self._seen[id(found)] = found
                todo += [part for part in self._keep(found) if type(part) not in ATOMS]

    def _keep(self, value: Any) -> Collection[Any]:
        """Remember a value without its parts, and give these."""
        kind: Any = type(value)
        if (undo := snapshot(value)) is not None:
            self._undo.append(undo)
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, nn.Module):  # one that is no submodule
            self.hidden[id(value)] = value
        elif isinstance(value, np.ndarray):
            return self._keep_array(value)
        elif isinstance(value, bytearray | array):
            self._keep_bytes(value)
        elif isinstance(value, MethodType):
            return (value.__self__,)
        elif isinstance(value, partial):
            return (value.func, *value.args, *value.keywords.values())
        elif is_iterator(kind):
            self.iterators.append(value)
        elif not isinstance(value, self._opaque) and not is_of_the_system(kind):
            return self._keep_parts(value)
        return ()

    def _keep_parts(self, value: Any) -> Collection[Any]:
        parts: Collection[Any] = ()
        if isinstance(value, dict | list | deque | set | tuple):  # other mappings may do more than hold
            self._left -= 10 + len(value)
            if len(value) > MANY or self._left < 0:
                self._keep_length(value)
            elif isinstance(value, dict):
                self._keep_mapping(value)
                parts = dict.values(value)  # a subclass may do more than give them
            else:
                parts = self._keep_items(value)
        if type(value).__module__.partition(".")[0] not in FOREIGN:
            parts = [*parts, *self._keep_attributes(value)]
        return () if ATOMS.issuperset(map(type, parts)) else parts

    def _later(self, undo: Callable[[Any], Any], argument: Any) -> None:
        self._undo.append(lambda: undo(argument))

    def _keep_attributes(self, value: Any) -> list[Any]:
        """Remember the attributes of an object, those in slots too; their values."""
        kind: Any = type(value)
        attributes = vars(value) if hasattr(value, "__dict__") else {}
        slots = [(slot, _read(slot, value)) for slot in _slots(kind)]
        parts = [*attributes.values(), *(kept for _, kept in slots if kept is not _MISSING)]
        self._left -= len(parts)
        if self._left < 0 or holds_what_waits(parts):
            return []
        if hasattr(value, "__dict__"):
            self._keep_mapping(attributes)
        for slot, kept in slots:

            def undo(slot: Any = slot, kept: Any = kept) -> None:
                if kept is _MISSING and _read(slot, value) is not _MISSING:
                    slot.__delete__(value)
                elif kept is not _read(slot, value):
                    with suppress(AttributeError):  # some that are written in C cannot be set
                        slot.__set__(value, kept)

            self._undo.append(undo)
        return parts

    def _keep_bytes(self, value: Any) -> None:
        """Copy a bytearray or an array of the standard library; of a large one remember the length."""
        if len(value) > SMALL:
            self._later(lambda end: value.__delitem__(slice(end, None)), len(value))
        else:
            self._later(lambda kept: value.__setitem__(slice(None), kept), value[:])

    def _keep_array(self, value: np.ndarray[Any, Any]) -> Collection[Any]:
        """Copy an array, and give the objects in it.

        Not one that nobody writes, or lives in a file, or is large and stayed as it was before.
        """
        changes = self._known.changes(value)
        if not value.flags.writeable or _is_in_a_file(value) or (value.size > SMALL and changes is False):
            return ()
        copy = value.copy()

        def undo() -> None:
            if changes is None and value.size > SMALL:
                self._known.learn(value, not _same_elements(value, copy))
            np.copyto(value, copy)

        self._undo.append(undo)
        return value.ravel().tolist() if value.dtype == object and value.size <= MANY else ()

    def _keep_mapping(self, value: dict[Any, Any]) -> None:
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may do more, or refuse
        kept = dict(base.items(value))

        def undo() -> None:
            present = dict(base.items(value))
            if not same_items(present, kept):  # also the order: names of buffers and metrics
                base.clear(value)
            elif same_items(present.values(), kept.values()):
                return
            for key, item in kept.items():
                base.__setitem__(value, key, item)

        self._undo.append(undo)

    def _keep_items(self, value: Any) -> Collection[Any]:
        """Remember a container that is no mapping; what is in it, if that may change."""
        base: Any = next(kind for kind in (list, deque, set, tuple) if isinstance(value, kind))
        kept = list(base.__iter__(value))  # a subclass may do more than give them
        if base is tuple:
            return kept
        refill = base.update if base is set else base.extend

        def undo() -> None:
            if not same_items(list(base.__iter__(value)), kept):
                base.clear(value)
                refill(value, kept)

        self._undo.append(undo)
        return () if base is set else kept

    def _keep_length(self, value: Any) -> None:
        """Remember how long a container is: what is appended is taken off again."""
        length = len(value)
        if isinstance(value, list):
            self._later(lambda end: value.__delitem__(slice(end, None)), length)
        elif isinstance(value, dict):
            self._undo.append(lambda: _shorten(value, length))
        elif isinstance(value, deque):
            head = list(islice(value, MANY))  # a full one loses its first entries to those that are appended
            self._undo.append(lambda: _shorten_deque(value, length, head))


def _shorten(value: dict[Any, Any], length: int) -> None:
    while len(value) > length:
        value.popitem()


def _shorten_deque(value: deque[Any], length: int, head: list[Any]) -> None:
    lost = next((index for index, item in enumerate(head) if value and item is value[0]), 0)
    while len(value) > length - lost:
        value.pop()
    value.extendleft(reversed(head[:lost]))


@cache
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    found = [vars(base).values() for base in kind.__mro__ if not ships_with_python(base.__module__)]
    return tuple(slot for values in found for slot in values if isinstance(slot, MemberDescriptorType))


def _read(slot: MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value, type(value))
    except AttributeError:  # it has no value yet
        return _MISSING


def _is_in_a_file(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


def _same_elements(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    if a.dtype.hasobject:
        return all(map(is_, a.flat, b.flat))
    return bool(((a == b) | ((a != a) & (b != b))).all()) if a.dtype.names is None else a.tobytes() == b.tobytes()


def same_items(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))
