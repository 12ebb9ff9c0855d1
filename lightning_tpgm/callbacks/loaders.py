"""The loaders of held-out data: by default the validation's, and as one process's share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
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


def has_default_loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether `default_loaders` will find any."""
    return _tpgm_hook(trainer, pl_module) is not None or validation_source(trainer).is_defined()


def default_loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[list[Iterable[Any]], str]:
    """``tpgm_dataloader()`` of the datamodule or else the module, if one is defined; else the validation loaders.

    Returns:
        The loaders and a description of them.

    Raises:
        MisconfigurationException: If ``tpgm_dataloader()`` gives something that cannot be iterated.
    """
    hook = _tpgm_hook(trainer, pl_module)
    if hook is not None:
        described, own = f"tpgm_dataloader() of {type(hook.__self__).__name__}", flat(hook())
        for loader in own:
            if not isinstance(loader, Iterable):
                raise MisconfigurationException(
                    f"{described} should return a loader, or a collection of them, found {type(loader).__name__}."
                )
        return own, described
    loaders = trainer.val_dataloaders
    if loaders is None:  # validation is switched off
        loaders = validation_source(trainer).dataloader()
    elif isinstance(loaders, Mapping | Sequence):
        loaders = validation_loader(trainer)  # the same, with its mode
    found = [] if loaders is None else flat(loaders)
    if all(isinstance(loader, list | tuple | dict) and not loader for loader in found):  # to Lightning [] is a loader
        why = "val_dataloader() gave None" if loaders is None else "there is no validation loader"
        raise MisconfigurationException(
            f"TPGMCallback found no held-out data to learn the radii from, because {why}. The held-out loader gave no"
            " batch: it is empty. Pass `dataloader`, or define tpgm_dataloader() or val_dataloader() in the datamodule"
            " or the module."
        )
    described = (
        "the validation data. Choosing radii and checkpoints on the same data makes the validation score optimistic; to"
        " keep them apart pass `dataloader` or define tpgm_dataloader()"
    )
    return found, described


def flat(loaders: Any) -> list[Any]:
    """The loaders of any collection; a CombinedLoader that takes a batch from each at a time is one."""
    if is_combined(loaders):
        return list(loaders.flattened) if comes_in_turn(loaders) else [loaders]
    return CombinedLoader(loaders).flattened


def parts(loader: Any) -> list[Any]:
    """The loaders in a CombinedLoader; any other is its only part."""
    return list(loader.flattened) if is_combined(loader) else [loader]


def own_loader(loader: Iterable[Any]) -> Iterable[Any]:
    """A loader that nobody else begins anew while it is in use.

    There is one iterator of a CombinedLoader, and one of a DataLoader whose workers persist; validation uses the same
    loaders. Workers do not persist here: the state of their random generators would be lost on resume.
    """
    if is_combined(loader):
        return _combined_of([own_loader(part) for part in parts(loader)], loader)
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        vars(loader).update(_iterator=None, persistent_workers=False)
    return loader


def _combined_of(loaders: list[Iterable[Any]], like: Any) -> Iterable[Any]:
    own: Any = copy.copy(like)
    own.flattened, own.limits, own._iterator = loaders, None, None
    return cast(Iterable[Any], own)


def is_combined(loader: object) -> bool:
    """Whether it is Lightning's CombinedLoader, whose batches come with their indices."""
    return isinstance(loader, classes("utilities.combined_loader:CombinedLoader"))


def _tpgm_hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        hook = getattr(owner, "tpgm_dataloader", None)
        if hook is not None:
            return hook
    return None


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
