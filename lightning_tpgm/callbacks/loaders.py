"""The loaders of held-out data: by default the validation's, and as one process's share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_tpgm.callbacks.framework import (
    CombinedLoader,
    MisconfigurationException,
    classes,
    comes_in_turn,
    pl,
    validation_loader,
    validation_source,
)
from lightning_tpgm.callbacks.shared import configuration_errors
from lightning_tpgm.callbacks.source import Anew, check_many_passes, ends_for_good, missing_arguments

HOW_TO_GIVE_THEM = (
    "Pass `dataloader`, or define tpgm_dataloader() or val_dataloader() in the datamodule or the module. FTPCallback"
    " needs none."
)
"""What to do where there are no held-out data."""


def has_default_loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether `default_loaders` will find any.

    Raises:
        MisconfigurationException: If the method that gives them cannot be called without arguments.
    """
    source, owner, name = validation_source(trainer), _has_own(trainer, pl_module), "tpgm_dataloader"
    defined = owner is not None or source.is_defined()
    if owner is None:
        owner, name = source.instance, "val_dataloader"
    elif not callable(owner.tpgm_dataloader):
        kind = type(owner.tpgm_dataloader).__name__
        raise MisconfigurationException(
            f"{_title(owner, name)} should be a method that returns a loader, found an attribute of type {kind}."
        )
    missing = missing_arguments(getattr(owner, name)) if callable(getattr(owner, name, None)) else ""
    if missing:
        raise MisconfigurationException(
            f"{_title(owner, name)} should be called without arguments, found that it needs {missing}. Give these"
            " defaults, or pass `dataloader`."
        )
    return defined


def default_loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[list[Iterable[Any]], str]:
    """``tpgm_dataloader()`` of the datamodule or else the module, if one is defined; else the validation loaders.

    Returns:
        The loaders and a description of them.

    Raises:
        MisconfigurationException: If there is none, or one that cannot be iterated.
    """
    owner = _has_own(trainer, pl_module)
    if owner is not None:
        title = _title(owner, "tpgm_dataloader")
        own = _checked(flat(owner.tpgm_dataloader()), title)
        again = [
            Anew(partial(_one_of, owner.tpgm_dataloader, i)) if ends_for_good(one) else one for i, one in enumerate(own)
        ]
        return again, title
    loaders, title = trainer.val_dataloaders, "`val_dataloaders`"
    if loaders is None:  # validation is switched off
        source = validation_source(trainer)
        loaders, title = source.dataloader(), _title(source.instance, "val_dataloader")
    elif isinstance(loaders, Mapping | Sequence):
        loaders = validation_loader(trainer)  # the same, with its mode
    found = [] if loaders is None else flat(loaders)
    if all(isinstance(loader, list | tuple | dict) and not loader for loader in found):  # to Lightning [] is a loader
        why = "val_dataloader() gave None" if loaders is None else "there is no validation loader"
        raise MisconfigurationException(
            f"TPGMCallback found no held-out data to learn the radii from, because {why}. {HOW_TO_GIVE_THEM}"
        )
    described = (
        "the validation data. Choosing radii and checkpoints on the same data makes the validation score optimistic. To"
        " keep them apart, pass `dataloader` or define tpgm_dataloader()"
    )
    with configuration_errors():
        for part in (part for loader in _checked(found, title) for part in parts(loader)):
            check_many_passes(title, part)
    return found, described


def _has_own(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """The datamodule or module that defines ``tpgm_dataloader()``, if one does."""
    owners = getattr(trainer, "datamodule", None), pl_module
    return next((owner for owner in owners if getattr(owner, "tpgm_dataloader", None) is not None), None)


def _one_of(method: Callable[[], Any], index: int) -> Any:
    return flat(method())[index]


def _title(owner: object, name: str) -> str:
    return f"{name}() of {type(owner).__name__}" if hasattr(owner, name) else "`val_dataloaders`"


def _checked(loaders: list[Any], title: str) -> list[Any]:
    for part in (part for loader in loaders for part in parts(loader)):
        if not hasattr(part, "__iter__") and not hasattr(part, "__getitem__"):
            raise MisconfigurationException(
                f"{title} should give a loader, or a collection of them, found {type(part).__name__}. Leave that out,"
                " or pass `dataloader`."
            )
    return loaders


def flat(loaders: Any) -> list[Any]:
    """The loaders of any collection; a CombinedLoader that takes a batch from each at a time is one."""
    if is_combined(loaders):
        return list(loaders.flattened) if comes_in_turn(loaders) else [loaders]
    return CombinedLoader(loaders).flattened


def parts(loader: Any) -> list[Any]:
    """The loaders in a CombinedLoader; any other is its only part."""
    return list(loader.flattened) if is_combined(loader) else [loader]


def own_loader(loader: Any, depth: int = 2) -> Any:
    """A loader that nobody else begins anew while it is in use.

    Validation uses the same loaders. There is only one iterator of a CombinedLoader, of a loader that is its own
    iterator, and of a DataLoader whose workers persist. Workers do not persist here: the state of their random
    generators would be lost on resume. A wrapper is copied, with its loaders' copies as attributes.

    Args:
        loader: Any iterable of batches.
        depth: How deep in wrappers loaders are looked for.
    """
    if is_combined(loader):
        return _combined_of([own_loader(part) for part in parts(loader)], loader)
    if isinstance(loader, DataLoader):
        if loader.persistent_workers:
            loader = copy.copy(loader)
            vars(loader).update(_iterator=None, persistent_workers=False)
        return loader
    if not depth or not isinstance(loader, Iterable) or ends_for_good(loader) or not _has_only_attributes(type(loader)):
        return loader
    # not by `copy`, which asks an object without attributes, of which some wrappers' __getattr__ makes no end
    found = vars(loader)
    own = {name: _own_attribute(value, depth - 1) for name, value in found.items()}
    if any(own[name] is not found[name] for name in found) or isinstance(loader, Iterator):
        loader = object.__new__(type(loader))
        vars(loader).update(own)
    return loader


def _has_only_attributes(kind: Any) -> bool:
    """Whether nothing of its objects is outside of their ``__dict__``, as it is with slots and in C."""
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return bool(kind.__new__ is object.__new__ and kind.__dictoffset__ != 0 and not slots)


def _own_attribute(value: Any, depth: int) -> Any:
    if type(value) in (list, tuple):
        own = [own_loader(one, 0) if isinstance(one, DataLoader) else one for one in value]
        return type(value)(own) if any(one is not other for one, other in zip(own, value, strict=True)) else value
    return value if isinstance(value, Dataset | nn.Module) else own_loader(value, depth)


def _combined_of(loaders: list[Iterable[Any]], like: Any) -> Iterable[Any]:
    own: Any = copy.copy(like)
    own.flattened, own._iterator = loaders, None
    own.limits = [math.inf if (length := length_of(loader)) is None else length for loader in loaders]
    return cast(Iterable[Any], own)


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it has, if it does: as Lightning, never ask it for more."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, OverflowError):
        return None


def is_stream(loader: Iterable[Any]) -> bool:
    """Whether what comes later can be reached only by what comes before, and there may be much of it."""
    return length_of(loader) is None or isinstance(getattr(loader, "dataset", None), IterableDataset)


def is_combined(loader: object) -> bool:
    """Whether it is Lightning's CombinedLoader, whose batches come with their indices."""
    return isinstance(loader, classes("utilities.combined_loader:CombinedLoader"))


def rebuild_loader(
    loader: Iterable[Any], *, shuffle: bool | None, seed: int, num_replicas: int, rank: int
) -> Iterable[Any]:
    """A loader like the given one whose batches are this process's share, in an order that depends on ``seed`` alone.

    Batch size, collate function and worker settings stay. A loader whose order is its own affair is returned as it is,
    and every process draws from all of it. Such are iterable data sets, custom samplers and batch samplers, DataLoaders
    with an ``__iter__`` of their own, and whatever is no DataLoader. Of a CombinedLoader the parts are rebuilt, each in
    the same order if they are equally long.

    Args:
        loader: Any iterable of batches.
        shuffle: Whether to shuffle; None keeps the loader's own setting.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: Index of this process.
    """
    if is_combined(loader):
        settings: Any = {"shuffle": shuffle, "seed": seed, "num_replicas": num_replicas, "rank": rank}
        return _combined_of([rebuild_loader(part, **settings) for part in parts(loader)], loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    plain_loader = type(loader).__iter__ is DataLoader.__iter__
    plain_sampler = type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
    plain_batches = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if not (plain_loader and plain_sampler and plain_batches):
        return loader
    if shuffle is None:
        shuffle = isinstance(loader.sampler, RandomSampler) or getattr(loader.sampler, "shuffle", False)
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "num_workers": loader.num_workers,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
        }
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=DistributedSampler(
            loader.dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed % 2**31
        ),
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        **workers,
    )
