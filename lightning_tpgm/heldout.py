"""The held-out batches that a callback draws for itself: cycling without end, sharded, resumable."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_tpgm.framework import (
    CombinedLoader,
    MisconfigurationException,
    classes,
    pl,
    rank_zero_info,
    rank_zero_warn,
    uses_distributed_sampler,
    validation_source,
)
from lightning_tpgm.troubles import shared_examples


class HeldOutBatch(NamedTuple):
    """One batch, its index within the pass over its loader, and the index of that loader."""

    batch: Any
    batch_idx: int
    dataloader_idx: int


class HeldOutBatches:
    """Draws batches from one or several loaders in turn, pass after pass.

    Iterators are made when the first batch is drawn and again whenever a pass ends: with the iterator, or with the
    loader's length if that is shorter, as in Lightning's own loops. Every draw seeds the global generators of torch,
    numpy and python with ``seed`` + number of draws: a shuffling loader or a random transform then depends on nothing
    but ``seed``, and a resumed run draws what an uninterrupted one would have drawn. Generators that a loader or its
    sampler brings along are seeded likewise, and put back after the draw. Call `draw` where the states of the global
    ones are isolated.

    Not covered are random transforms in workers that persist: their generators go on from pass to pass.

    Args:
        loaders: Iterables of batches.
        seed: The same on all processes.
    """

    def __init__(self, loaders: list[Iterable[Any]], seed: int) -> None:
        self.loaders = loaders
        self.seed = seed
        self.drawn = 0  # batches drawn in all
        self.passes = 0  # passes begun before the present one
        self.position = 0  # batches drawn in the present pass
        self._iterator: Iterator[HeldOutBatch] | None = None

    def draw(self) -> HeldOutBatch:
        """The next batch.

        Raises:
            MisconfigurationException: If a whole pass gives no batch.
        """
        if self._iterator is None:
            self._iterator = _one_pass(self.loaders, self.passes)
            # the state may be that of an interrupted run: go to its position by drawing again what it drew
            position, self.drawn, self.position = self.position, self.drawn - self.position, 0
            for _ in range(position):
                self._draw_from(self._iterator)
        batch = self._draw_from(self._iterator)
        if batch is None:
            self.passes, self.position = self.passes + 1, 0
            self._iterator = _one_pass(self.loaders, self.passes)
            batch = self._draw_from(self._iterator)
        if batch is None:
            raise MisconfigurationException(
                "The held-out loader gave no batch: it is empty, or can be iterated only once. Pass a `dataloader`"
                " with at least one batch that can be iterated again."
            )
        return batch

    def _draw_from(self, iterator: Iterator[HeldOutBatch]) -> HeldOutBatch | None:
        with _seeded(self.seed + self.drawn, self.loaders):
            batch = next(iterator, None)
        if batch is not None:
            self.drawn, self.position = self.drawn + 1, self.position + 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Seed and position."""
        return {"seed": self.seed, "drawn": self.drawn, "passes": self.passes, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the batches of the interrupted pass are drawn again when the next one is asked for."""
        self.seed, self.drawn = state["seed"], state["drawn"]
        self.passes, self.position = state["passes"], state["position"]
        self._iterator = None


def _one_pass(loaders: list[Iterable[Any]], passes: int) -> Iterator[HeldOutBatch]:
    """All batches once; no method, since a cycle of references would keep workers alive until a garbage collection."""
    for dataloader_idx, loader in enumerate(loaders):
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(passes)
        if _is_combined(loader):  # gives all three already
            yield from map(HeldOutBatch._make, loader)
        else:
            for batch_idx, batch in enumerate(islice(loader, _length(loader))):
                yield HeldOutBatch(batch, batch_idx, dataloader_idx)


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it has, if it does: as Lightning, never ask it for more."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


Source = Iterable[Any] | Callable[[], Iterable[Any]] | str | None


def held_out_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, source: Source, state: dict[str, int] | None = None
) -> HeldOutBatches:
    """The batches that a callback draws, from what the user passed as ``dataloader``; says which data it uses.

    Args:
        trainer: Its strategy says which share of the data is this process's.
        pl_module: The module.
        source: A loader, a function that returns one, the import path of either; None: see `default_loaders`.
        state: What `HeldOutBatches.state_dict` gave, to go on from there.

    Raises:
        MisconfigurationException: If the source leads to no loader.
    """
    if source is None:
        loaders, described = default_loaders(trainer, pl_module)
    else:
        loaders, described = [resolve_loader(source)], "`dataloader`"
    seed = trainer.strategy.broadcast(torch.initial_seed() % 2**62) if state is None else state["seed"]
    replicas = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    if source is None or (replicas["num_replicas"] > 1 and uses_distributed_sampler(trainer)):
        shuffle = True if source is None else None
        loaders = [rebuild_loader(loader, shuffle=shuffle, seed=seed, **replicas) for loader in loaders]
    rank_zero_info(f"The radii are learned on {described}.")
    batches = HeldOutBatches(loaders, seed)
    if state is not None:
        batches.load_state_dict(state)
    return batches


def warn_of_shared_examples(trainer: pl.Trainer, batches: HeldOutBatches) -> None:
    """Warn if the held-out data are known to hold training data."""
    training = trainer.train_dataloader  # not its truth, which is a length that it may not have
    shared, count = shared_examples([] if training is None else _flat(training), batches.loaders)
    if shared:
        rank_zero_warn(
            f"{shared} of the {count} held-out examples are training examples, too: radii that are learned on them let"
            " through what fits the training data. Pass other data as `dataloader`, or define tpgm_dataloader()."
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
        described, found = f"tpgm_dataloader() of {type(hook.__self__).__name__}", _flat(hook())
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
    return _flat(loaders), described


def _flat(loaders: Any) -> list[Any]:
    return [loaders] if _is_combined(loaders) else CombinedLoader(loaders).flattened


def _is_combined(loader: object) -> bool:
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


@contextmanager
def _seeded(seed: int, loaders: list[Iterable[Any]]) -> Iterator[None]:
    """The global generators are seeded, and until exit also those that loaders and samplers bring along."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    found = [getattr(owner, "generator", None) for loader in loaders for owner in _with_samplers(loader)]
    generators = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        for generator, _ in states:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _with_samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
