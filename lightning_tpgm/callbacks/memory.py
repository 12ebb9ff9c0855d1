"""Remembering what hangs on a module, so that it can be put back in place: containers, objects, generators, arrays."""

from __future__ import annotations

import os
import random
import sys
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, MutableMapping
from contextlib import AbstractContextManager, ContextDecorator, ExitStack
from functools import cache
from itertools import islice
from operator import is_
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tpgm.callbacks.framework import classes
from lightning_tpgm.callbacks.weights import SMALL

ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
MANY = 1_000  # entries of a container: of more only those that are appended are taken back
_SHORT = 16
_ENOUGH = 10_000  # entries of all containers of one attribute
_OPAQUE = (
    *(Tensor, type, ModuleType, FunctionType, MethodType),
    *(torch.utils.data.Dataset, torch.utils.data.DataLoader),
)
_FOREIGN = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy", "lightning_tpgm"}
)
_HARMLESS = frozenset(
    {"builtins", "collections", "collections.abc", "_collections", "_collections_abc", "abc", "typing", "_random"}
)
_PLAIN = frozenset(
    {SimpleNamespace, Namespace, *Namespace.__mro__, random.Random, AbstractContextManager, ContextDecorator}
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
    """

    def __init__(self, known: Known) -> None:
        lightning = ("trainer:Trainer", "core:LightningDataModule", "callbacks:Callback")
        self.tensors: dict[int, Tensor] = {}
        self.hidden: dict[int, nn.Module] = {}
        self._opaque = (*_OPAQUE, *(found for name in lightning for found in classes(name)))
        self._known = known
        self._undo: list[Callable[[], None]] = []
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
            return ATOMS.issuperset(map(type, value))  # it cannot change
        if kind is list and len(value) <= _SHORT and ATOMS.issuperset(map(type, value)):
            self._short.append((value, value.copy()))
            return True
        return False

    def keep(self, value: Any) -> None:
        """Remember the value of an attribute and what it holds."""
        self._left = _ENOUGH
        self._keep(value)

    def _keep(self, value: Any, inside_object: bool = False) -> None:
        if id(value) in self._seen:
            return
        kind: Any = type(value)
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, nn.Module):  # one that is no submodule
            self.hidden[id(value)] = value
        elif isinstance(value, np.ndarray):
            self._keep_array(value)
        elif isinstance(value, torch.Generator):
            self._later(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            self._later(lambda state: setattr(value.bit_generator, "state", state), value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self._later(value.set_state, value.get_state())
        elif not isinstance(value, self._opaque) and not _is_of_the_system(kind):
            self._keep_parts(value, inside_object)

    def _keep_parts(self, value: Any, inside_object: bool) -> None:
        parts: Collection[Any] = ()
        if isinstance(value, random.Random):
            self._later(value.setstate, value.getstate())
        elif isinstance(value, dict | list | deque | set | tuple):  # other mappings may do more than hold
            self._left -= 10 + len(value)
            if len(value) > MANY or self._left < 0:
                self._keep_length(value)
                return
            if isinstance(value, dict):
                self._keep_mapping(value)
                parts = value.values()
            elif isinstance(value, set):
                self._keep_items(value, value.update)
            else:
                parts = value
                if not isinstance(value, tuple):
                    self._keep_items(value, value.extend)
        elif not inside_object and type(value).__module__.partition(".")[0] not in _FOREIGN:
            parts, inside_object = self._keep_attributes(value), True
        if not set(map(type, parts)) <= ATOMS:
            for part in parts:
                if type(part) not in ATOMS:
                    self._keep(part, inside_object)

    def _later(self, undo: Callable[[Any], Any], argument: Any) -> None:
        self._undo.append(lambda: undo(argument))

    def _keep_attributes(self, value: Any) -> list[Any]:
        """Remember the attributes of an object, those in slots too; their values."""
        parts: list[Any] = []
        if hasattr(value, "__dict__"):
            self._keep_mapping(vars(value))
            parts = list(vars(value).values())
        kind: Any = type(value)
        for slot in _slots(kind):
            kept = _read(slot, value)
            parts.append(kept)

            def undo(slot: Any = slot, kept: Any = kept) -> None:
                if kept is _MISSING and _read(slot, value) is not _MISSING:
                    slot.__delete__(value)
                elif kept is not _read(slot, value):
                    slot.__set__(value, kept)

            self._undo.append(undo)
        return [part for part in parts if part is not _MISSING]

    def _keep_array(self, value: np.ndarray[Any, Any]) -> None:
        """Copy an array; not one that nobody writes, or lives in a file, or is large and stayed as it was before."""
        changes = self._known.changes(value)
        if not value.flags.writeable or _is_in_a_file(value) or (value.size > SMALL and changes is False):
            return
        copy = value.copy()

        def undo() -> None:
            if changes is None and value.size > SMALL:
                self._known.learn(value, not _same_elements(value, copy))
            np.copyto(value, copy)

        self._undo.append(undo)

    def _keep_mapping(self, value: MutableMapping[Any, Any]) -> None:
        kept = dict(value)

        def undo() -> None:
            if not same_items(value, kept):  # also the order: names of buffers and metrics
                value.clear()
                value.update(kept)
            elif not same_items(value.values(), kept.values()):
                for key, item in kept.items():
                    value[key] = item

        self._undo.append(undo)

    def _keep_items(self, value: list[Any] | deque[Any] | set[Any], refill: Callable[[list[Any]], None]) -> None:
        kept = list(value)

        def undo() -> None:
            if not same_items(value, kept):
                value.clear()
                refill(kept)

        self._undo.append(undo)

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
def _is_of_the_system(kind: type) -> bool:
    """Whether a class is, or derives from, one of the standard library that is more than a container.

    Futures, events, queues, locks, pools and processes, files: put back to an earlier state, they would wait for ever.
    """
    return any(
        base not in _PLAIN
        and base.__module__ not in _HARMLESS
        and _ships_with_python(base.__module__.partition(".")[0])
        for base in kind.__mro__
    )


@cache
def _ships_with_python(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None)  # a project's own `code` or `test` is none
    theirs = file is None or (file.startswith(os.path.dirname(os.__file__)) and "site-packages" not in file)
    return package in sys.stdlib_module_names and theirs


@cache
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    found = [vars(base).values() for base in kind.__mro__ if not _ships_with_python(base.__module__)]
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
