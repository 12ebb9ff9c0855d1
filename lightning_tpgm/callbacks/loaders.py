"""Where held-out data come from, and loaders that are a process's share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_tpgm.callbacks.framework import (
    CombinedLoader,
    MisconfigurationException,
    classes,
    pl,
    validation_source,
)

Source = Iterable[Any] | Callable[[], Iterable[Any]] | str | None


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
        described, found = f"tpgm_dataloader() of {type(hook.__self__).__name__}", flat(hook())
        for loader in found:
            if not isinstance(loader, Iterable):
                raise MisconfigurationException(
                    f"{described} should return a loader, or a collection of them, found {type(loader).__name__}."
                )
        return found, described
    loaders = trainer.val_dataloaders
    if loaders is None:  # validation is switched off
        loaders = validation_source(trainer).dataloader()
    described = (
        "the validation data. Choosing radii and checkpoints on the same data makes the validation score optimistic; to"
        " keep them apart pass `dataloader` or define tpgm_dataloader()"
    )
    return flat(loaders), described


def flat(loaders: Any) -> list[Any]:
    """The loaders of any collection; a CombinedLoader is one."""
    return [loaders] if is_combined(loaders) else CombinedLoader(loaders).flattened


def is_combined(loader: object) -> bool:
    """Whether it is Lightning's CombinedLoader, whose batches come with their indices."""
    return isinstance(loader, classes("utilities.combined_loader:CombinedLoader"))


def _tpgm_hook(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        hook = getattr(owner, "tpgm_dataloader", None)
        if hook is not None:
            return hook
    return None


def resolve_loader(dataloader: Iterable[Any] | Callable[[], Iterable[Any]] | str) -> Iterable[Any]:
    """The loader itself from a loader, a function that makes one, or the import path of either.

    Raises:
        MisconfigurationException: If the import path leads nowhere or the result cannot be iterated.
    """
    found: Any = dataloader
    if isinstance(found, str):
        try:
            found = resolve_name(found)
        except (ImportError, AttributeError, ValueError) as error:
            raise MisconfigurationException(
                f"`dataloader` import path {dataloader!r} leads nowhere: {error}. It should look like"
                " 'my_project.data:held_out'."
            ) from error
    if callable(found) and not isinstance(found, Iterable):
        found = found()
    if not isinstance(found, Iterable):
        raise MisconfigurationException(
            f"`dataloader` should give an iterable of batches, found {type(found).__name__} from {dataloader!r}."
        )
    return found


def rebuild_loader(
    loader: Iterable[Any], *, shuffle: bool | None, seed: int, num_replicas: int, rank: int
) -> Iterable[Any]:
    """A loader like the given one whose batches are this process's share, in an order that depends on ``seed`` alone.

    Batch size, collate function and worker settings stay. A loader whose order is its own affair (an iterable data set,
    a custom sampler or batch sampler, a DataLoader with an ``__iter__`` of its own, something that is no DataLoader) is
    returned as it is: then every process draws from all of it.

    Args:
        loader: Any iterable of batches.
        shuffle: Whether to shuffle; None keeps the loader's own setting.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: Index of this process.
    """
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
