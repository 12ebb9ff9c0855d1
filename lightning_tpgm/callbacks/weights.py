"""Tensors that a step itself may change, teachers and averages for instance, put back without copying all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_tpgm.callbacks.framework import MisconfigurationException

SMALL = 2**14  # elements: fewer are copied sooner than thought about
_version, _pointer = attrgetter("_version"), methodcaller("data_ptr")


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


class Weights:
    """Puts tensors back after each evaluation, and learns in the first one which of them need a copy.

    Small ones are copied. Of large ones the first evaluation shows which are written to. These alone are copied from
    then on. That the others stay as they are is checked by their version, which costs nothing.
    """

    def __init__(self) -> None:
        self._known = Known()
        self._seen: list[Tensor] = []  # what the following lists were made for
        self._copied: list[Tensor] = []
        self._watched: list[Tensor] = []
        self._guarded: list[Tensor] = []
        self._swappable: list[Tensor] = []
        self._aliases: list[Tensor] = []  # of these: the same memory
        self._pointers: list[int] = []  # to it
        self._first = True

    @contextmanager
    def unchanged(
        self, fixed: list[Tensor], loose: Sequence[Tensor], name_of: Callable[[Tensor], str]
    ) -> Iterator[None]:
        """All tensors are as before on exit.

        Args:
            fixed: Parameters and buffers: the same list as in the last evaluation if they are the same.
            loose: Other tensors; small ones among them may change in any evaluation.
            name_of: For messages.

        Raises:
            MisconfigurationException: If one changed that has no copy.
        """
        if fixed is not self._seen:
            self._sort(fixed)
        copied, watched, guarded = list(self._copied), list(self._watched), list(self._guarded)
        for tensor in filter(_has_elements, loose):
            self._sort_one(tensor, tensor.numel() <= SMALL or not self._first, copied, watched, guarded)
        if not _can_watch(watched, fixed):
            copied, watched = [*copied, *watched], []
        self._refresh_aliases()
        others = [(t, t.data) for t in loose if _has_elements(t) and not _is_composed(t)]
        copies = [(tensor, _Copy(tensor)) for tensor in copied]
        unwritten = [*watched, *guarded]
        versions = list(map(_version, unwritten))
        writes = _Writes(watched) if watched else None
        try:
            if writes is None:
                yield
            else:
                with writes:
                    yield
        finally:
            written = {} if writes is None else writes.copies
            if list(map(_pointer, self._swappable)) != self._pointers:
                others += zip(self._swappable, self._aliases, strict=True)
            for tensor, alias in others:
                if tensor.data_ptr() != alias.data_ptr():
                    tensor.data = alias
            self._learn(copies, watched, written, {id(tensor) for tensor in loose})
            with ExitStack() as stack:  # all of them, also after one that raises
                for copy in [*(copy for _, copy in copies), *written.values()]:
                    stack.callback(copy.put_back)
        if list(map(_version, unwritten)) != versions:
            self._refuse_changes(unwritten, versions, written, name_of)

    def _refuse_changes(
        self, tensors: list[Tensor], versions: list[int], written: Collection[int], name_of: Callable[[Tensor], str]
    ) -> None:
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor._version != version and id(tensor) not in written:
                raise MisconfigurationException(
                    f"The evaluation of the held-out loss changed {name_of(tensor)}, which it has not done before, and"
                    " so there is no copy to put back. Pass a `loss` that does not update it: 'validation_step', or a"
                    " callable (pl_module, batch) -> Tensor."
                )

    def _learn(
        self,
        copies: list[tuple[Tensor, _Copy]],
        watched: list[Tensor],
        written: Collection[int],
        loose: Collection[int],
    ) -> None:
        for tensor, copy in copies:
            if self._known.changes(tensor) is None:
                # loose ones are new in every step, maybe: no comparison, for which a GPU would have to wait
                changed = tensor._version != copy.version or (id(tensor) not in loose and copy.differs())
                self._known.learn(tensor, changed)
        for tensor in watched:
            self._known.learn(tensor, id(tensor) in written)
        if self._first or watched:
            self._seen = []  # sort anew, by what was learned
        self._first = False

    def _sort(self, fixed: list[Tensor]) -> None:
        self._seen, self._copied, self._watched, self._guarded = fixed, [], [], []
        usable = [tensor for tensor in fixed if _has_elements(tensor)]
        for tensor in usable:
            self._sort_one(tensor, self._known.changes(tensor) is None, self._copied, self._watched, self._guarded)
        self._swappable = [t for t in usable if isinstance(t, nn.Parameter) and not _is_composed(t)]
        self._pointers = []

    def _sort_one(
        self, tensor: Tensor, copies: bool, copied: list[Tensor], watched: list[Tensor], guarded: list[Tensor]
    ) -> None:
        changes = self._known.changes(tensor)
        if _is_composed(tensor):
            if not isinstance(tensor, nn.Parameter):
                copied.append(tensor)
        elif changes or (copies and tensor.numel() <= SMALL):
            copied.append(tensor)
        elif changes is not None:
            guarded.append(tensor)
        elif self._first or isinstance(tensor, nn.Parameter):
            watched.append(tensor)
        else:  # watching makes an evaluation slower, and this one may be another in every step
            copied.append(tensor)

    def _refresh_aliases(self) -> None:
        """Training itself may have given a tensor other memory."""
        pointers = list(map(_pointer, self._swappable))
        if pointers != self._pointers:
            self._pointers, self._aliases = pointers, [tensor.data for tensor in self._swappable]


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies each of some tensors right before the first operation inside that writes to its memory."""

    supports_higher_order_operators = True

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: dict[int, _Copy] = {}
        self._waiting: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self._waiting.setdefault(_memory(tensor), []).append(tensor)

    @classmethod
    @override
    def is_infra_mode(cls) -> bool:  # else torch.compile gives up, for good, every function that is called inside
        return True

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and self._waiting and (schema.is_mutable or "batch_norm" in schema.name):
            for index, argument in enumerate(schema.arguments):
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                # some batch norms write to their statistics and do not say so in the schema
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written or argument.name in ("running_mean", "running_var"):
                    for tensor in given if isinstance(given, list | tuple) else [given]:
                        self._before_write(tensor)
        return func(*args, **kwargs)

    def _before_write(self, tensor: object) -> None:
        if isinstance(tensor, Tensor) and not _is_composed(tensor) and tensor.layout is torch.strided:
            for waiting in self._waiting.pop(_memory(tensor), ()):
                self.copies[id(waiting)] = _Copy(waiting)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _can_watch(watched: list[Tensor], fixed: list[Tensor]) -> bool:
    """Not among tensors that are made of others, as FSDP2's are, nor where torch.compile would give up."""
    return not watched or (hasattr(TorchDispatchMode, "is_infra_mode") and not any(map(_is_composed, fixed)))


def _has_elements(tensor: Tensor) -> bool:
    """Whether it can be copied and put back: sparse ones hold their values elsewhere."""
    return tensor.layout is torch.strided and not tensor.is_inference() and not tensor.is_meta and tensor.numel() > 0


def _is_composed(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def without_subclass(tensor: Tensor) -> Tensor:
    """The same elements as an ordinary tensor, for libraries whose tensors have methods or metadata of their own.

    Tensors that are made of others (DTensor) stay what they are: they have no elements of their own.
    """
    return tensor if type(tensor) is Tensor or _is_composed(tensor) else tensor.as_subclass(Tensor)


def _ordinary(tensor: Tensor) -> Tensor:
    """The elements that have memory of their own: an expanded dimension has one."""
    tensor = without_subclass(tensor)
    for dim, (size, stride) in enumerate(zip(tensor.size(), tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class _Copy:
    """The elements of a tensor as they are now, and its version."""

    def __init__(self, tensor: Tensor) -> None:
        self._elements = _ordinary(tensor.detach() if type(tensor) in (Tensor, nn.Parameter) else tensor)
        self._copy = self._elements.detach().clone()
        self.version = tensor._version
        # a graph of the training step that is still in use finds the version that it saw
        self._same_version = _unsafe_preserve_version_counter(self._elements)

    def differs(self) -> bool:
        return not torch.equal(self._elements.detach(), self._copy)

    def put_back(self) -> None:
        """Write the elements, whatever the version says: BatchNorm does not count its changes there."""
        with self._same_version, torch.no_grad():
            self._elements.copy_(self._copy)
