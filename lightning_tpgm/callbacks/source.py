"""What users pass as held-out data: checked when it is passed, resolved to a loader when it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_tpgm.callbacks.framework import MisconfigurationException, classes
from lightning_tpgm.callbacks.shared import configuration_errors
from lightning_tpgm.methods.method import check

Source = Iterable[Any] | Callable[[], Iterable[Any]] | str | None

_HUGGING_FACE = ("datasets.arrow_dataset", "datasets.iterable_dataset", "datasets.dataset_dict")  # have data sets


def check_source(source: object) -> None:
    """Raise a ValueError or a TypeError about a ``dataloader`` that no fit could use."""
    if isinstance(source, str):
        names = source.replace(":", ".", 1).split(".")
        path = len(names) > 1 and all(name.isidentifier() for name in names)
        check(path, "dataloader", "an import path like 'my_project.data:held_out'", source)
        return
    check_many_passes("`dataloader`", source)
    _check_gives_batches(source)
    usable = source is None or isinstance(source, Iterable) or callable(source)
    check(usable, "dataloader", "a loader, a function that returns one, an import path or None", source)
    if callable(source) and not isinstance(source, Iterable):
        _check_no_arguments(source)


def name_of(function: Callable[..., object]) -> str:
    """Its qualified name if it has one."""
    return repr(getattr(function, "__qualname__", function))


class Anew:
    """What a function gives, which is called anew for each pass.

    Args:
        function: Gives an iterable.
    """

    def __init__(self, function: Callable[[], Iterable[Any]]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        """The batches of one pass."""
        return iter(self._function())


def ends_for_good(found: object) -> bool:
    """Whether it is an iterator that nothing begins anew: a generator, or what `iter`, `map` and `zip` give."""
    kind: Any = type(found)
    return isinstance(found, Iterator) and (
        kind.__module__ in ("builtins", "itertools")
        or kind.__iter__ is Iterator.__iter__
        or isinstance(found, _BaseDataLoaderIter)
    )


def check_many_passes(
    title: str, found: object, instead: str = "as `dataloader` a function that makes an iterator for each pass"
) -> None:
    """Raise a TypeError about what ends for good."""
    if ends_for_good(found):
        raise TypeError(
            f"{title} should begin anew in each pass, found an iterator of type {type(found).__name__!r}, which ends"
            f" for good. Pass the loader itself, or {instead}."
        )


def _check_gives_batches(found: object) -> None:
    kind = type(found).__name__
    if isinstance(found, classes("core:LightningDataModule")):
        raise TypeError(
            f"`dataloader` should be a loader, found the LightningDataModule {kind!r}. Pass it to trainer.fit and leave"
            " `dataloader` out: its tpgm_dataloader(), or else its val_dataloader(), is used then. Or pass one of its"
            " methods that gives a loader."
        )
    if isinstance(found, Dataset) or any(base.__module__ in _HUGGING_FACE for base in type(found).__mro__):
        raise TypeError(
            f"`dataloader` should be a loader, found the data set {kind!r}, which gives examples, not batches. Pass"
            " DataLoader(dataset, batch_size=...), or DataLoader(dataset, batch_size=None) if it gives whole batches."
        )
    if isinstance(found, Tensor | np.ndarray):
        raise TypeError(
            f"`dataloader` should be a loader, found a {kind} of shape {tuple(found.shape)}. Pass a loader of batches"
            " like those of training, or a list of such batches."
        )
    members = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    if any(isinstance(member, DataLoader) for member in members):
        raise TypeError(
            f"`dataloader` should be a loader, found a {kind} of loaders. Pass CombinedLoader(loaders, 'sequential') of"
            " lightning.pytorch.utilities for one after the other, or return them from tpgm_dataloader()."
        )


def missing_arguments(function: Callable[..., object]) -> str:
    """The arguments that a function cannot be called without, quoted; empty if there are none."""
    with suppress(ValueError):  # some callables have no signature
        by_name = inspect.signature(function, follow_wrapped=False).parameters.values()  # a decorator may fill some in
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return ", ".join(repr(p.name) for p in by_name if p.default is p.empty and p.kind not in variable)
    return ""


def _check_no_arguments(function: Callable[..., object]) -> None:
    missing = missing_arguments(function)
    if missing:
        raise TypeError(
            f"`dataloader` should be a function that is called without arguments, found {name_of(function)}, which"
            f" needs {missing}. Pass a loader, or functools.partial(function, ...) with them."
        )


def resolve_loader(dataloader: Iterable[Any] | Callable[[], Iterable[Any]] | str) -> Iterable[Any]:
    """The loader itself from a loader, a function that makes one, or the import path of either.

    Raises:
        MisconfigurationException: If the import path leads nowhere or the result cannot be iterated.
    """
    found: Any = dataloader
    if isinstance(dataloader, str):
        try:
            found = resolve_name(dataloader)
        except (ImportError, AttributeError, ValueError) as error:
            raise MisconfigurationException(
                f"`dataloader` import path {dataloader!r} leads nowhere: {error}. It should look like"
                " 'my_project.data:held_out'."
            ) from error
    with configuration_errors():
        if callable(found) and not isinstance(found, Iterable):
            _check_no_arguments(found)
        else:
            check_many_passes("`dataloader`", found)
    if callable(found) and not isinstance(found, Iterable):
        function, found = found, found()
        if ends_for_good(found):
            return Anew(function)
    with configuration_errors():
        _check_gives_batches(found)
    if not isinstance(found, Iterable):
        raise MisconfigurationException(
            f"`dataloader` should give an iterable of batches, found {type(found).__name__} from {dataloader!r}. Let it"
            " return a loader."
        )
    return found
