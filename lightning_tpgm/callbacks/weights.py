"""Tensors that a step itself may change, teachers and averages for instance, put back without copying all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
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


class Weights:
    """Puts tensors back after each evaluation, and remembers from one to the next how.

    Small ones are copied. Large ones are copied right before the first operation that writes to them. Such an operation
    is seen whatever the tensor's version says.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []  # what the following were made for
        self._fixed = _Sorted([], True)

    @contextmanager
    def unchanged(
        self, fixed: list[Tensor], loose: Sequence[Tensor], name_of: Callable[[Tensor], str]
    ) -> Iterator[None]:
        """All tensors are as before on exit.

        Args:
            fixed: Parameters and buffers: the same list as in the last evaluation if they are the same.
            loose: Other tensors.
            name_of: For messages.

        Raises:
            MisconfigurationException: If one changed that has no copy.
        """
        if fixed is not self._seen or self._fixed.is_elsewhere():  # training itself may have given them other memory
            self._seen, self._fixed = fixed, _Sorted(fixed, _can_watch(fixed))
        groups = [self._fixed, _Sorted(loose, self._fixed.can_watch)]
        for group in groups:
            for small in group.small:
                small.take()
        others = [tensor for group in groups for tensor in group.others]
        watched = [tensor for group in groups for tensor in group.watched]
        versions = [(tensor, tensor._version) for tensor in [*others, *watched]]
        copies = {id(tensor): _Copy(tensor) for tensor in others}
        writes = _Writes(watched, copies)
        try:
            with writes if watched else ExitStack():
                yield
        finally:
            restored = {*copies}
            for group in filter(_Sorted.is_elsewhere, groups):
                restored |= group.point_back()
            with ExitStack() as stack:  # all of them, also after one that raises
                for put_back in [s.put_back for group in groups for s in group.small] + [
                    copy.put_back for copy in copies.values()
                ]:
                    stack.callback(put_back)
            changed = [(tensor, version) for tensor, version in versions if tensor._version != version]
            for tensor, version in changed:
                if id(tensor) in restored:
                    _rewind(tensor, version)
        for tensor, _ in changed:
            if id(tensor) not in restored:
                raise MisconfigurationException(
                    f"The evaluation of the held-out loss changed {name_of(tensor)} in a way that torch does not show,"
                    " and so there is no copy to put back. Pass a `loss` that does not update it: 'validation_step', or"
                    " a callable (pl_module, batch) -> Tensor."
                )


class _Sorted:
    """Tensors, sorted by how they are put back.

    Attributes:
        can_watch: Whether writes to large ones can be seen.
        small: Copies of the small ones.
        watched: The large ones, if these can be watched.
        others: What each evaluation copies one by one.
    """

    def __init__(self, tensors: Sequence[Tensor], can_watch: bool) -> None:
        usable = [tensor for tensor in tensors if _has_elements(tensor)]
        self.can_watch = can_watch
        self._plain = [tensor for tensor in usable if not _is_composed(tensor)]
        self._aliases = [tensor.data for tensor in self._plain]  # the same memory
        self._pointers = list(map(_pointer, self._plain))  # to it
        alike: dict[Any, list[Tensor]] = {}  # a GPU copies those of one type at once
        views = [tensor for tensor in self._plain if _is_lazy(tensor)]  # torch does not copy them among many at once
        direct = [tensor for tensor in self._plain if not _is_lazy(tensor)]
        for tensor in direct:
            if tensor.numel() <= SMALL:
                alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        self.small = list(map(_SmallCopies, alike.values()))
        large = [tensor for tensor in direct if tensor.numel() > SMALL]
        self.watched = large if can_watch else []
        composed = [t for t in usable if _is_composed(t) and not isinstance(t, nn.Parameter)]
        self.others = [*composed, *views, *([] if can_watch else large)]

    def is_elsewhere(self) -> bool:
        """Whether one has other memory than it had."""
        return list(map(_pointer, self._plain)) != self._pointers

    def point_back(self) -> set[int]:
        """Give the tensors the memory that they had; the ids of those that have another."""
        swapped = set()
        for tensor, alias, pointer in zip(self._plain, self._aliases, self._pointers, strict=True):
            if tensor.data_ptr() != pointer:
                tensor.data = alias
                swapped.add(id(tensor))
        return swapped


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies each of some tensors right before the first operation inside that writes to its memory.

    Args:
        tensors: These.
        copies: Where the copies go, by the tensors' ids.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: list[Tensor], copies: dict[int, _Copy]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies
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
        for index, name in _written_by(func):
            given = args[index] if index < len(args) else kwargs.get(name)
            for tensor in given if isinstance(given, list | tuple) else [given]:
                self._before_write(tensor)
        return func(*args, **kwargs)

    def _before_write(self, tensor: object) -> None:
        if isinstance(tensor, Tensor) and not _is_composed(tensor) and tensor.layout is torch.strided:
            for waiting in self._waiting.pop(_memory(tensor), ()):
                self._copies[id(waiting)] = _Copy(waiting)


@cache
def _written_by(operation: Any) -> list[tuple[int, str]]:
    """Which arguments an operation writes to: their positions and names."""
    schema = getattr(operation, "_schema", None)
    if schema is None:
        return []
    # some batch norms write to their statistics and do not say so in the schema
    silent = ("running_mean", "running_var") if "batch_norm" in schema.name else ()
    return [
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.name in silent or (argument.alias_info is not None and argument.alias_info.is_write)
    ]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _can_watch(tensors: Sequence[Tensor]) -> bool:
    """Not among tensors that are made of others, as FSDP2's are, nor where torch.compile would give up."""
    return hasattr(TorchDispatchMode, "is_infra_mode") and not any(map(_is_composed, tensors))


def _has_elements(tensor: Tensor) -> bool:
    """Whether it can be copied and put back: sparse and nested ones hold their values elsewhere."""
    plain = tensor.layout is torch.strided and not tensor.is_nested
    return plain and not tensor.is_inference() and not tensor.is_meta and tensor.numel() > 0


def _is_lazy(tensor: Tensor) -> bool:
    """Whether it is conjugated or negated only when it is read."""
    return tensor.is_conj() or tensor.is_neg()


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


class _SmallCopies:
    """Copies of many small tensors, made and put back in one operation."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._elements = [_ordinary(tensor.data) for tensor in tensors]
        self._copies: list[Tensor] = []
        self._versions: list[int] = []

    def take(self) -> None:
        """Copy the elements as they are now."""
        self._versions = list(map(_version, self._tensors))
        if self._copies:
            torch._foreach_copy_(self._copies, self._elements)
        else:
            self._copies = [elements.clone() for elements in self._elements]

    def put_back(self) -> None:
        """Write the elements, whatever the versions say, and have the versions as they were."""
        if self._copies:
            torch._foreach_copy_(self._elements, self._copies)
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if tensor._version != version:
                _rewind(tensor, version)


def _rewind(tensor: Tensor, version: int) -> None:
    """A graph of the training step that is still in use finds the version that it saw."""
    guard = _unsafe_preserve_version_counter(tensor)
    vars(guard).update(prev_version=version, prev_versions=(version,))  # one of the two, by torch's release
    with guard:
        pass


class _Copy:
    """The elements of a tensor as they are now."""

    def __init__(self, tensor: Tensor) -> None:
        self._elements = _ordinary(tensor.detach() if type(tensor) in (Tensor, nn.Parameter) else tensor)
        self._copy = self._elements.detach().clone()

    def put_back(self) -> None:
        """Write the elements, whatever the version says: BatchNorm does not count its changes there."""
        with torch.no_grad():
            self._elements.copy_(self._copy)
