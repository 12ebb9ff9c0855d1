"""The held-out batches that a callback draws for itself: cycling without end, sharded, resumable."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from lightning_tpgm.callbacks.framework import (
    MisconfigurationException,
    pl,
    rank_zero_info,
    uses_distributed_sampler,
)
from lightning_tpgm.callbacks.generators import generators_put_back, seed_torch
from lightning_tpgm.callbacks.loaders import (
    default_loaders,
    is_combined,
    is_stream,
    length_of,
    own_loader,
    parts,
    rebuild_loader,
)
from lightning_tpgm.callbacks.source import Source, resolve_loader
from lightning_tpgm.callbacks.step_errors import loading


class HeldOutBatch(NamedTuple):
    """One batch, its index within the pass over its loader, and the index of that loader."""

    batch: Any
    batch_idx: int
    dataloader_idx: int


class HeldOutBatches:
    """Draws batches from one or several loaders in turn, pass after pass.

    Iterators are made when the first batch is drawn and again whenever a pass ends. It ends with the iterator, or with
    the loader's length if that is shorter, as in Lightning's own loops. Every draw seeds the global generators of
    torch, numpy and python with ``seed`` + number of draws. So a shuffling loader or a random transform depends on
    ``seed`` alone, and a resumed run draws what an uninterrupted one would have drawn. Generators that a loader, its
    sampler or its data set brings along are seeded likewise, and put back after the draw. Call `draw` where the states
    of the global ones are isolated. A batch that is None is passed over, as in Lightning's training.

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

    @loading("give a batch")
    def draw(self) -> HeldOutBatch:
        """The next batch.

        Raises:
            MisconfigurationException: If a whole pass gives no batch, or in place of what the loader raised.
        """
        if self._iterator is None:
            self._iterator = _one_pass(self.loaders, self.passes)
            # the state may be that of an interrupted run: go to its position by drawing again what it drew
            if self.position and any(is_stream(part) for loader in self.loaders for part in parts(loader)):
                rank_zero_info(
                    f"To go on where the run was, {self.position} held-out batches are drawn again: their stream is"
                    " read from its beginning. If that takes long, pass a `dataloader` whose passes end sooner."
                )
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
        for part in parts(loader):
            sampler = getattr(part, "sampler", None)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(passes)
        if is_combined(loader):
            begun = iter(loader)  # gives all three already, and knows its length from now on
            drawn: Iterable[Any] = islice(begun, length_of(loader))
        else:
            batches = enumerate(islice(loader, length_of(loader)))
            drawn = ((batch, batch_idx, dataloader_idx) for batch_idx, batch in batches)
        yield from (HeldOutBatch(*one) for one in drawn if one[0] is not None)


@loading("begin")
def held_out_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    source: Source,
    state: dict[str, int],
    announce: bool,
) -> HeldOutBatches:
    """The batches that a callback draws, from what the user passed as ``dataloader``; says which data it uses.

    Args:
        trainer: Its strategy says which share of the data is this process's.
        pl_module: The module.
        source: A loader, a function that returns one, the import path of either. None: see `default_loaders`.
        state: Seed and position to go on from, as `HeldOutBatches.state_dict` gives them.
        announce: Whether to say which data it uses.

    Raises:
        MisconfigurationException: If the source leads to no loader, or in place of what it raised.
    """
    if source is None:
        loaders, described = default_loaders(trainer, pl_module)
    else:
        loaders, described = [resolve_loader(source)], "`dataloader`"
    replicas = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    if source is None or (replicas["num_replicas"] > 1 and uses_distributed_sampler(trainer)):
        shuffle = True if source is None else None
        loaders = [rebuild_loader(loader, shuffle=shuffle, seed=state["seed"], **replicas) for loader in loaders]
    if announce:
        rank_zero_info(f"The radii are learned on {described}.")
    batches = HeldOutBatches([own_loader(loader) for loader in loaders], state["seed"])
    batches.load_state_dict(state)
    return batches


@contextmanager
def _seeded(seed: int, loaders: list[Iterable[Any]]) -> Iterator[None]:
    """The global generators are seeded, and until exit also those that hang on loaders, samplers and data sets."""
    seed_torch(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    with generators_put_back([part for loader in loaders for part in parts(loader)], seed):
        yield
