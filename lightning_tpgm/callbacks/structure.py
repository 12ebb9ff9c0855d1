"""A module and its parts as flat lists, so that to remember and to compare them is a matter of a few passes in C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain, compress, pairwise
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_tpgm.callbacks.memory import same_items
from lightning_tpgm.sharding import is_fsdp2

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}  # torch's own
_MISSING = object()


class Structure:
    """All modules below a root, and what they are made of. It serves until a submodule or an attribute comes or goes.

    Args:
        root: The module.

    Attributes:
        ids: Of all parts.
        metrics: The parts that are metrics.
        scripted: The parts whose attributes live in TorchScript.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.ids = frozenset(map(id, modules))
        self.metrics = [module for module in modules if isinstance(module, Metric)]
        self.scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        alike: dict[tuple[str, ...], list[nn.Module]] = {}  # those with attributes of the same names
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                alike.setdefault(_names_in(vars(module)), []).append(module)
        self._plain = [module for members in alike.values() for module in members]
        self._names = [names for names, members in alike.items() for _ in members]
        self._readers = [(itemgetter(*names), list(map(vars, members))) for names, members in alike.items()]
        self._attributes: list[dict[str, Any]] = [vars(module) for module in self._plain]
        self._sizes = list(map(len, self._attributes))
        self._order = [list(kept) for kept in self._attributes]
        starts = list(accumulate(map(len, self._names), initial=0))
        with_flag = [i for i, names in enumerate(self._names) if names[0] == "training"]
        self._flags_at = [starts[i] for i in with_flag]  # among `values`
        self._with_flag = [self._attributes[i] for i in with_flag]
        # FSDP2 exchanges parameters itself
        kinds = ["_buffers", "_modules", *([] if any(map(is_fsdp2, modules)) else ["_parameters"])]
        tables = [kept[kind] for kept in self._attributes for kind in kinds]
        self._tables: list[dict[str, Any]] = [table for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._contents = [table.values() for table in self._tables]  # views: they show what is there when they are read
        self._ends = list(accumulate(map(len, self._tables), initial=0))
        self._keys = self._present_keys()
        self._entries = self._present_entries()
        self._children = list(chain.from_iterable(module._modules.values() for module in self._plain))
        self._tensors = self._find_tensors()

    def is_current(self) -> bool:
        """Whether nothing came or went since it was made."""
        if any(self._empty) or list(map(len, self._attributes)) != self._sizes or self._present_keys() != self._keys:
            return False
        if not self._same_entries():
            # other buffers or parameters in place of some are found here, other submodules ask for a new structure
            if not same_items(list(chain.from_iterable(m._modules.values() for m in self._plain)), self._children):
                return False
            self._entries, self._tensors = self._present_entries(), self._find_tensors()
        return True

    def _present_keys(self) -> list[str]:
        return list(chain.from_iterable(self._tables))

    def _present_entries(self) -> list[Any]:
        return list(chain.from_iterable(self._contents))

    def _same_entries(self) -> bool:
        """Whether the tables hold the same objects; to be asked if they have the same keys."""
        return all(map(is_, chain.from_iterable(self._contents), self._entries))

    def values(self) -> list[Any]:
        """The values of all attributes that are not torch's own.

        Raises:
            KeyError: If one went and another one came.
        """
        return list(chain.from_iterable(self._read()))

    def _read(self) -> Iterator[tuple[Any, ...]]:
        return chain.from_iterable([map(reader, members) for reader, members in self._readers])

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and the buffers of torch's own classes; the buffers of all others. The same lists if the same."""
        return self._tensors

    def _find_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        fixed: dict[int, Tensor] = {}
        loose: dict[int, Tensor] = {}
        for module, kept in zip(self._plain, self._attributes, strict=True):
            buffers = fixed if type(module).__module__.startswith("torch.nn.") else loose
            for kind, into in (("_parameters", fixed), ("_buffers", buffers)):
                into.update((id(tensor), tensor) for tensor in kept[kind].values() if tensor is not None)
        for module in self.scripted:
            loose.update((id(tensor), tensor) for tensor in module.buffers(recurse=False))
        return list(fixed.values()), list(loose.values())

    def owner_of(self, value: object) -> str:
        """Where an attribute is, in words."""
        for module, kept in zip(self._plain, self._attributes, strict=True):
            for name, found in kept.items():
                if found is value:
                    return f"the attribute {name!r} of {type(module).__name__}"
        return "an attribute"

    @contextmanager
    def evaluating(self, values: list[Any], eval_mode: bool = True) -> Iterator[None]:
        """No part is in train mode; on exit each of those that were is again. To be entered within `unchanged`.

        Args:
            values: What `values` gave just now.
            eval_mode: False: every part is in its own mode.
        """
        flags = list(map(values.__getitem__, self._flags_at))
        trained = list(compress(zip(self._with_flag, flags, strict=True), flags))
        scripted = [module.training for module in self.scripted]
        try:
            if eval_mode:
                # past `train`: adapters that merge themselves there would change frozen weights
                for kept, _ in trained:
                    kept["training"] = False
                for module in self.scripted:
                    module.training = False
            yield
        finally:
            for kept, flag in trained:
                kept["training"] = flag
            for module, flag in zip(self.scripted, scripted, strict=True):
                if module.training != flag:
                    module.training = flag

    def modes(self, values: list[Any]) -> Callable[[], None]:
        """What puts every part into the mode that it had when `values` gave these just now."""
        scripted = [module.training for module in self.scripted]

        def put_back() -> None:
            for kept, flag in zip(self._with_flag, map(values.__getitem__, self._flags_at), strict=True):
                kept["training"] = flag
            for module, flag in zip(self.scripted, scripted, strict=True):
                module.training = flag

        return put_back

    @contextmanager
    def unchanged(self, values: list[Any]) -> Iterator[None]:
        """Attributes, submodules, parameters and buffers are the same objects on exit.

        Args:
            values: What `values` gave just now.
        """
        try:
            yield
        finally:
            if any(self._empty):
                for table in self._empty:
                    table.clear()
            if self._present_keys() != self._keys or not self._same_entries():
                for table, (start, end) in zip(self._tables, pairwise(self._ends), strict=True):
                    _refill(table, dict(zip(self._keys[start:end], self._entries[start:end], strict=True)))
            if list(map(len, self._attributes)) != self._sizes or not self._same(values):
                self._put_back(values)

    def _same(self, values: list[Any]) -> bool:
        try:
            return all(map(is_, chain.from_iterable(self._read()), values))
        except KeyError:  # another one came for one that went
            return False

    def _put_back(self, values: list[Any]) -> None:
        ends = accumulate(map(len, self._names), initial=0)
        for kept, names, order, (start, end) in zip(
            self._attributes, self._names, self._order, pairwise(ends), strict=True
        ):
            before = dict(zip(names, values[start:end], strict=True))
            if len(kept) != len(order) or any(kept.get(name, _MISSING) is not value for name, value in before.items()):
                _refill(kept, {key: before[key] if key in before else kept[key] for key in order})


def _names_in(attributes: dict[str, Any]) -> tuple[str, ...]:
    """The attributes that may change, at least two: `itemgetter` of one name gives no tuple."""
    flag = "training" if "training" in attributes else "_is_full_backward_hook"  # a compiled module has none of its own
    own = [name for name in attributes if name not in _BOOKKEEPING and name != "training"]
    return (flag, *(own or [flag]))


def _refill(table: dict[str, Any], kept: dict[str, Any]) -> None:
    if list(table) != list(kept):
        table.clear()
    elif all(map(is_, table.values(), kept.values())):
        return
    table.update(kept)
